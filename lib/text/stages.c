/* The normalizers and pre-tokenizers at work. A pre-tokenizer hands each of its pieces straight to the next stage, so
 * that no list of pieces is kept and ids come out in the order of the text. */
#include "text/stage.h"

#include "base/mem.h"

#include <string.h>

/* GPT-2's spelling of bytes: printable Latin-1 stands for itself, the others follow from U+0100 on in their order. */
static uint32_t byte_char(unsigned char b)
{
    if ((b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b != 0xad))
        return b;
    return b < 0x21 ? 0x100u + b : b < 0xa1 ? 0x121u + b - 0x7f : 0x143u;
}

int moec__char_byte(uint32_t cp)
{
    if (cp < 0x100)
        return byte_char((unsigned char)cp) == cp ? (int)cp : -1;
    if (cp < 0x121)
        return (int)cp - 0x100;
    if (cp < 0x143)
        return (int)cp - 0x121 + 0x7f;
    return cp == 0x143 ? 0xad : -1;
}

static moec_status add_bytes(moec__buf *out, const char *s, size_t n, moec_err *err)
{
    size_t want;
    if (!moec_mul_size(&want, n, 2) || !moec_add_size(&want, want, out->n))
        return moec_fail(err, MOEC_ENOMEM, "a text of %zu bytes is more than this machine can address", n);
    moec_status st = MOEC_GROW(out->p, out->cap, want, err);
    if (st != MOEC_OK)
        return st;
    char *to = out->p + out->n;
    for (size_t i = 0; i < n; i++) {
        uint32_t cp = byte_char((unsigned char)s[i]);
        if (cp < 0x80) {
            *to++ = (char)cp;
        } else {
            *to++ = (char)(0xc0 | cp >> 6);
            *to++ = (char)(0x80 | (cp & 0x3f));
        }
    }
    out->n = (size_t)(to - out->p);
    return MOEC_OK;
}

/* ---- normalizers ---- */

/* Stages of a hostile file could blow a text up without bound, each by a factor of its own. No real one needs more
 * than 18. */
static moec_status check_growth(size_t to, size_t from, moec_err *err)
{
    if (to / 64 <= from || to < (1u << 16))
        return MOEC_OK;
    return moec_fail(err, MOEC_EFORMAT, "%zu bytes of text become more than %zu", from, to);
}

moec_status moec__run_form(moec__buf *out, moec__piece *in, const moec__stage *stage, moec__matcher *m, moec_err *err)
{
    (void)m;
    return moec__normal_form(out, stage->form, stage->calm, in->s, in->n, err);
}

moec_status moec__run_prepend(moec__buf *out, moec__piece *in, const moec__stage *stage, moec__matcher *m,
                              moec_err *err)
{
    (void)m;
    moec_status st = in->n > 0 ? moec__buf_add(out, stage->text, stage->n_text, err) : MOEC_OK;
    return st == MOEC_OK ? moec__buf_add(out, in->s, in->n, err) : st;
}

moec_status moec__run_replace(moec__buf *out, moec__piece *in, const moec__stage *stage, moec__matcher *m,
                              moec_err *err)
{
    moec_status st = MOEC_OK;
    moec__search q = {.p = stage->pattern, .m = m, .s = in->s, .n = in->n};
    size_t copied = 0, from, to, before = out->n;
    bool found, first = in->first;
    if (in->n == 0)
        return MOEC_OK;
    for (;;) {
        MOEC_TRY(moec__search_next(&found, &from, &to, &q, err));
        if (!found)
            break;
        /* What stands for several characters, or for nothing that is left, does not count as the beginning of the
         * text. */
        if (from == 0 && to > 0 && (stage->n_text == 0 || to > moec__utf8_len((unsigned char)in->s[0])))
            first = false;
        MOEC_TRY(moec__buf_add(out, in->s + copied, from - copied, err));
        MOEC_TRY(moec__buf_add(out, stage->text, stage->n_text, err));
        MOEC_TRY(check_growth(out->n - before, in->n, err));
        copied = to;
    }
    MOEC_TRY(moec__buf_add(out, in->s + copied, in->n - copied, err));
    in->first = first;
done:
    return st;
}

moec_status moec__run_lower(moec__buf *out, moec__piece *in, const moec__stage *stage, moec__matcher *m,
                            moec_err *err)
{
    (void)stage;
    (void)m;
    return moec__lower_case(out, in->s, in->n, err);
}

moec_status moec__run_strip(moec__buf *out, moec__piece *in, const moec__stage *stage, moec__matcher *m,
                            moec_err *err)
{
    (void)m;
    size_t lo = stage->left ? moec__skip_space(in->s, 0, in->n) : 0;
    size_t hi = stage->right ? moec__skip_space_back(in->s, lo, in->n) : in->n;
    in->first = in->first && lo == 0;
    return moec__buf_add(out, in->s + lo, hi - lo, err);
}

moec_status moec__run_byte_form(moec__buf *out, moec__piece *in, const moec__stage *stage, moec__matcher *m,
                                moec_err *err)
{
    (void)stage;
    (void)m;
    return add_bytes(out, in->s, in->n, err);
}

moec_status moec__normalize(moec__piece *out, moec_encoder *e, moec__piece in, moec_err *err)
{
    const moec__stages *stages = &e->t->normalize;
    size_t n = in.n;
    for (size_t i = 0; i < stages->n; i++) {
        moec__buf *to = &e->rewritten[i % 2];
        to->n = 0;
        moec_status st = stages->at[i].rewrite(to, &in, &stages->at[i], e->matcher, err);
        if (st == MOEC_OK)
            st = check_growth(to->n, n, err);
        if (st != MOEC_OK)
            return moec_within(err, st, "normalizer");
        in.s = to->p;
        in.n = to->n;
    }
    *out = in;
    return MOEC_OK;
}

/* ---- pre-tokenizers ---- */

moec_status moec__pass_on(moec_encoder *e, size_t k, moec__piece piece, moec_err *err)
{
    if (piece.n == 0 || e->out->n >= e->limit)
        return MOEC_OK;
    if (k < e->t->split.n)
        return e->t->split.at[k].split(e, k, piece, err);
    return moec__bpe_piece(e->out, e->merger, &e->t->bpe, piece.s, piece.n, err);
}

moec_status moec__run_bytes(moec_encoder *e, size_t k, moec__piece in, moec_err *err)
{
    moec__buf *b = &e->scratch[k];
    b->n = 0;
    moec_status st = add_bytes(b, in.s, in.n, err);
    return st == MOEC_OK ? moec__pass_on(e, k + 1, (moec__piece){b->p, b->n, in.first}, err) : st;
}

static bool starts_with(moec__piece in, const moec__stage *stage)
{
    return in.n >= stage->n_text && memcmp(in.s, stage->text, stage->n_text) == 0;
}

moec_status moec__run_prefix(moec_encoder *e, size_t k, moec__piece in, moec_err *err)
{
    const moec__stage *stage = &e->t->split.at[k];
    moec_status st = MOEC_OK;
    moec__buf *b = &e->scratch[k];
    if (starts_with(in, stage))
        return moec__pass_on(e, k + 1, in, err);
    b->n = 0;
    MOEC_TRY(moec__buf_add(b, stage->text, stage->n_text, err));
    MOEC_TRY(moec__buf_add(b, in.s, in.n, err));
    MOEC_TRY(moec__pass_on(e, k + 1, (moec__piece){b->p, b->n, in.first}, err));
done:
    return st;
}

moec_status moec__run_metaspace(moec_encoder *e, size_t k, moec__piece in, moec_err *err)
{
    const moec__stage *stage = &e->t->split.at[k];
    moec_status st = MOEC_OK;
    moec__buf *b = &e->scratch[k];
    bool prefix = stage->scheme == MOEC__ALWAYS || (stage->scheme == MOEC__FIRST && in.first);
    b->n = 0;
    if (prefix && in.s[0] != ' ' && !starts_with(in, stage))
        MOEC_TRY(moec__buf_add(b, stage->text, stage->n_text, err));
    for (size_t i = 0; i < in.n;) {
        const char *space = memchr(in.s + i, ' ', in.n - i);
        size_t to = space ? (size_t)(space - in.s) : in.n;
        MOEC_TRY(moec__buf_add(b, in.s + i, to - i, err));
        if (space)
            MOEC_TRY(moec__buf_add(b, stage->text, stage->n_text, err));
        i = to + 1;
    }
    MOEC_TRY(moec__pass_on(e, k + 1, (moec__piece){b->p, b->n, in.first}, err));
done:
    return st;
}

/* Folds the matches and the gaps between them into pieces, in one pass from left to right. */
typedef struct fold {
    moec_encoder *e;
    size_t k;
    moec__piece in;
    const moec__stage *stage;
    size_t from, to; /* the piece in hand */
    bool held, flag; /* whether there is one; whether its last part was a match */
} fold;

static moec_status emit(fold *f, size_t from, size_t to, moec_err *err)
{
    return moec__pass_on(f->e, f->k + 1, (moec__piece){f->in.s + from, to - from, f->in.first && from == 0}, err);
}

static moec_status take(fold *f, size_t from, size_t to, bool match, moec_err *err)
{
    bool flag = match != f->stage->invert, joins = false;
    switch (f->stage->behaviour) {
    case MOEC__ISOLATED:
        return emit(f, from, to, err);
    case MOEC__REMOVED:
        return flag ? MOEC_OK : emit(f, from, to, err);
    case MOEC__MERGED_WITH_PREVIOUS: /* a match that follows a gap */
        joins = f->held && flag && !f->flag;
        break;
    case MOEC__MERGED_WITH_NEXT: /* a gap that follows a match; what they make is a gap */
        joins = f->held && !flag && f->flag;
        break;
    case MOEC__CONTIGUOUS:
        joins = f->held && flag == f->flag;
        break;
    }
    moec_status st = MOEC_OK;
    if (!joins) {
        if (f->held)
            st = emit(f, f->from, f->to, err);
        f->from = from;
        f->held = true;
    }
    f->to = to;
    f->flag = flag;
    return st;
}

moec_status moec__run_split(moec_encoder *e, size_t k, moec__piece in, moec_err *err)
{
    moec_status st = MOEC_OK;
    fold f = {.e = e, .k = k, .in = in, .stage = &e->t->split.at[k]};
    moec__search q = {.p = f.stage->pattern, .m = e->matcher, .s = in.s, .n = in.n};
    size_t seen = 0, from, to;
    bool found = true;
    while (found && e->out->n < e->limit) {
        MOEC_TRY(moec__search_next(&found, &from, &to, &q, err));
        if (!found)
            from = in.n;
        if (seen != from)
            MOEC_TRY(take(&f, seen, from, false, err));
        if (found)
            MOEC_TRY(take(&f, from, to, true, err));
        seen = found ? to : from;
    }
    if (f.held)
        MOEC_TRY(emit(&f, f.from, f.to, err));
done:
    return st;
}
