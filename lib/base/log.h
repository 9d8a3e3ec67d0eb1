/* Messages and progress, all on stderr; stdout belongs to results. On a terminal progress is one line with bar, rate and
 * time left that is redrawn; in a log it is a plain line from time to time. Also the interrupt flag. */
#ifndef MOEC_BASE_LOG_H
#define MOEC_BASE_LOG_H

#include "base/err.h"

#include <stdbool.h>
#include <stdint.h>

typedef enum moec_level { MOEC_QUIET = -1, MOEC_NORMAL = 0, MOEC_VERBOSE = 1 } moec_level;
MOEC_API void moec_log_set(moec_level level);
/** "moecompress: text" unless quiet. */
MOEC_API void moec_say(const char *fmt, ...) MOEC_PRINTF(1, 2);
/** "moecompress: warning: text", at every level. */
MOEC_API void moec_warn(const char *fmt, ...) MOEC_PRINTF(1, 2);
/** As moec_say, only with -v. */
MOEC_API void moec_note(const char *fmt, ...) MOEC_PRINTF(1, 2);

/* Progress of one piece of long work. total and done count `unit` ("tokens", "bytes": shown with SI prefixes). Steps may
 * come from several threads. Zero-initialise, start, step, finish. */
typedef struct moec_progress {
    const char *what, *unit;
    uint64_t total, done, skipped; /* skipped: done by an earlier run, left out of the rate */
    double started, shown;
    bool on;
} moec_progress;
MOEC_API void moec_progress_start(moec_progress *p, const char *what, const char *unit, uint64_t total, uint64_t skipped);
MOEC_API void moec_progress_step(moec_progress *p, uint64_t n);
MOEC_API void moec_progress_finish(moec_progress *p);
/** The work failed: takes the bar off the terminal, so that the error has a line of its own. Nothing when it was never
 *  started or has finished. */
MOEC_API void moec_progress_stop(moec_progress *p);

/** Seconds of a monotonic clock. */
MOEC_API double moec_now(void);

/** Makes SIGINT and SIGTERM set the flag that moec_interrupted reads; the second one kills as usual. */
MOEC_API void moec_catch_signals(void);
/** MOEC_EINTR with text "interrupted" once a signal came, else MOEC_OK. Cheap; call it between pieces of work. */
MOEC_API moec_status moec_interrupted(moec_err *err) MOEC_USE_RESULT;

#endif
