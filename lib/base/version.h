/* The version of library and program; set once, in CMakeLists.txt. */
#ifndef MOEC_BASE_VERSION_H
#define MOEC_BASE_VERSION_H

#include "base/err.h"

/** "0.1.0". */
MOEC_API const char *moec_version(void);

#endif
