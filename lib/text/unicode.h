/* Unicode normal forms and lower case; the library's only sight of utf8proc. */
#ifndef MOEC_TEXT_UNICODE_H
#define MOEC_TEXT_UNICODE_H

#include "text/utf8.h"

typedef enum moec__form { MOEC__NFC, MOEC__NFD, MOEC__NFKC, MOEC__NFKD } moec__form;

/* One bit for each code point below U+10000: it stays as it is in NFC and nothing composes with what is in front of
 * it. */
typedef struct moec__calm {
    uint8_t bits[0x10000 / 8];
} moec__calm;
/** Milliseconds; to be made once for each tokenizer with NFC. MOEC_ENOMEM. Free with moec_free. */
moec_status moec__calm_new(moec__calm **out, moec_err *err) MOEC_USE_RESULT;

/** Appends the form of checked UTF-8. `calm` may be NULL; with it NFC of text that is NFC already is one scan.
 *  Cost: linear, runs of combining marks of any length included. MOEC_ENOMEM. Source: Unicode Annex 15;
 *  departs from it for code points younger than Unicode 9, which stay as they are (see unicode.c). */
moec_status moec__normal_form(moec__buf *out, moec__form form, const moec__calm *calm, const char *s, size_t n,
                              moec_err *err) MOEC_USE_RESULT;

/** Appends the lower case of every character by itself (no final sigma). MOEC_ENOMEM. */
moec_status moec__lower_case(moec__buf *out, const char *s, size_t n, moec_err *err) MOEC_USE_RESULT;

#endif
