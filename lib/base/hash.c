/* XXH3-128 behind our own names; the only file that sees xxhash.h. */
#include "base/hash.h"

#include "base/file.h"
#include "base/mem.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

struct moec_hash {
    XXH3_state_t *state;
};

moec_status moec_hash_new(moec_hash **out, moec_err *err)
{
    moec_status st = MOEC_NEW(*out, 1, err);
    if (st != MOEC_OK)
        return st;
    (*out)->state = XXH3_createState();
    if (!(*out)->state) {
        moec_free(*out);
        *out = NULL;
        return moec_fail(err, MOEC_ENOMEM, "out of memory: no room for a hash");
    }
    XXH3_128bits_reset((*out)->state);
    return MOEC_OK;
}

void moec_hash_add(moec_hash *h, const void *bytes, size_t n)
{
    if (n > 0)
        XXH3_128bits_update(h->state, bytes, n);
}

void moec_hash_text(moec_hash *h, const char *text)
{
    size_t n = strlen(text);
    unsigned char len[8];
    for (int i = 0; i < 8; i++)
        len[i] = (unsigned char)((n >> (8 * i)) & 0xff);
    moec_hash_add(h, len, sizeof len);
    moec_hash_add(h, text, n);
}

static moec_digest to_digest(XXH128_hash_t h)
{
    moec_digest d;
    snprintf(d.hex, sizeof d.hex, "%016llx%016llx", (unsigned long long)h.high64, (unsigned long long)h.low64);
    return d;
}

moec_digest moec_hash_digest(const moec_hash *h)
{
    return to_digest(XXH3_128bits_digest(h->state));
}

void moec_hash_free(moec_hash *h)
{
    if (!h)
        return;
    XXH3_freeState(h->state);
    moec_free(h);
}

moec_digest moec_hash_bytes(const void *bytes, size_t n)
{
    return to_digest(XXH3_128bits(n ? bytes : "", n));
}

moec_status moec_hash_file(moec_digest *out, uint64_t *end, int fd, uint64_t from, const char *what, moec_err *err)
{
    enum { STEP = 1 << 20 };
    moec_status st = MOEC_OK;
    moec_hash *h = NULL;
    char *buf = NULL;
    *end = from;
    MOEC_TRY(moec_hash_new(&h, err));
    MOEC_TRY(MOEC_NEW(buf, STEP, err));
    for (;;) {
        ssize_t n = pread(fd, buf, STEP, (off_t)*end);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            st = moec_fail_errno(err, errno, what);
            goto done;
        }
        if (n == 0)
            break;
        moec_hash_add(h, buf, (size_t)n);
        *end += (uint64_t)n;
    }
    *out = moec_hash_digest(h);
done:
    moec_free(buf);
    moec_hash_free(h);
    return st;
}
