/* Errors: a status code returned by every function that can fail, and one explicit record that carries the text.
 * Nothing in the library prints an error, exits or aborts; tools turn a status into an exit code (moec_exit_code). */
#ifndef MOEC_BASE_ERR_H
#define MOEC_BASE_ERR_H

#include <stddef.h>

#if defined(__GNUC__)
#define MOEC_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#define MOEC_USE_RESULT __attribute__((warn_unused_result))
#define MOEC_API __attribute__((visibility("default")))
#else
#define MOEC_PRINTF(fmt, args)
#define MOEC_USE_RESULT
#define MOEC_API
#endif

#define MOEC_COUNT(array) (sizeof(array) / sizeof((array)[0]))

typedef enum moec_status {
    MOEC_OK = 0,
    MOEC_EINVAL,   /* an argument or option is impossible                   exit 2 */
    MOEC_EIO,      /* the operating system refused; text has strerror       exit 1 */
    MOEC_EFORMAT,  /* the bytes are not what their format promises          exit 3 */
    MOEC_ESHAPE,   /* a tensor is missing or has other dimensions           exit 3 */
    MOEC_ENUMERIC, /* not finite, singular, or did not converge             exit 3 */
    MOEC_EEXIST,   /* an output is already there                            exit 3 */
    MOEC_ENOMEM,   /* an allocation failed                                  exit 4 */
    MOEC_ENOFIT,   /* would not fit the memory, disk or byte budget         exit 4 */
    MOEC_EINTR,    /* SIGINT or SIGTERM arrived; the work can be resumed    exit 5 */
    MOEC_STATUS_COUNT
} moec_status;

typedef struct moec_err {
    moec_status code;
    char text[1000]; /* one line, "where: what is, what was expected", no full stop */
} moec_err;

/** Records the first cause and returns `code`. `err` may be NULL. Long texts are cut. */
MOEC_API moec_status moec_fail(moec_err *err, moec_status code, const char *fmt, ...) MOEC_PRINTF(3, 4);

/** Replaces control characters by '?': names from hostile files must not forge lines or drive the terminal. moec_fail,
 *  moec_say, moec_warn and moec_note do so with their texts. */
MOEC_API void moec_plain_line(char *text);

/** Puts "fmt: " in front of the text when `st` is not MOEC_OK; returns `st` unchanged. */
MOEC_API moec_status moec_within(moec_err *err, moec_status st, const char *fmt, ...) MOEC_PRINTF(3, 4);

/** 0 done, 1 failed, 2 usage, 3 bad input, 4 does not fit, 5 interrupted. */
MOEC_API int moec_exit_code(moec_status st);

/* For functions with `moec_status st` and a `done:` label that releases in reverse order. */
#define MOEC_TRY(call)                    \
    do {                                  \
        if ((st = (call)) != MOEC_OK)     \
            goto done;                    \
    } while (0)

#endif
