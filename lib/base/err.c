/* Recording and prefixing of error texts; the table from status to exit code. */
#include "base/err.h"

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

void moec_plain_line(char *text)
{
    for (unsigned char *c = (unsigned char *)text; *c; c++) {
        bool c1 = c[0] == 0xc2 && c[1] >= 0x80 && c[1] < 0xa0; /* U+0080..U+009F in UTF-8: some terminals obey these */
        if (*c < 0x20 || *c == 0x7f || c1)
            *c = '?';
        if (c1)
            *++c = '?';
    }
}

moec_status moec_fail(moec_err *err, moec_status code, const char *fmt, ...)
{
    if (!err)
        return code;
    err->code = code;
    va_list ap;
    va_start(ap, fmt);
    /* The caller may pass err->text as an argument, so the new text is made aside. */
    char text[sizeof err->text];
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    moec_plain_line(text);
    memcpy(err->text, text, sizeof text);
    return code;
}

moec_status moec_within(moec_err *err, moec_status st, const char *fmt, ...)
{
    if (st == MOEC_OK || !err)
        return st;
    char where[256];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(where, sizeof where, fmt, ap);
    va_end(ap);
    return moec_fail(err, st, "%s: %s", where, err->text);
}

int moec_exit_code(moec_status st)
{
    static const int code[] = {
        [MOEC_OK] = 0,     [MOEC_EINVAL] = 2,   [MOEC_EIO] = 1,    [MOEC_EFORMAT] = 3, [MOEC_ESHAPE] = 3,
        [MOEC_ENUMERIC] = 3, [MOEC_EEXIST] = 3, [MOEC_ENOMEM] = 4, [MOEC_ENOFIT] = 4,  [MOEC_EINTR] = 5,
    };
    _Static_assert(MOEC_COUNT(code) == MOEC_STATUS_COUNT, "one exit code per status");
    return (unsigned)st < MOEC_COUNT(code) ? code[st] : 1;
}
