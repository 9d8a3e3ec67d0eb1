/* MOEC_VERSION comes from the build, for this file alone: a new version recompiles one line. */
#include "base/version.h"

const char *moec_version(void)
{
    return MOEC_VERSION;
}
