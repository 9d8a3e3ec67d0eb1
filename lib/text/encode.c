/* Text to ids: repair of the bytes, added tokens, normalizers, added tokens again, then the pre-tokenizers and the
 * model. */
#include "text/stage.h"

#include "base/mem.h"

moec_status moec_encoder_new(moec_encoder **out, const moec_tokenizer *t, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_encoder *e = NULL;
    *out = NULL;
    MOEC_TRY(MOEC_NEW(e, 1, err));
    e->t = t;
    MOEC_TRY(moec__matcher_new(&e->matcher, err));
    MOEC_TRY(moec__merger_new(&e->merger, err));
    *out = e;
    e = NULL;
done:
    moec_encoder_free(e);
    return st;
}

void moec_encoder_free(moec_encoder *e)
{
    if (!e)
        return;
    for (size_t i = 0; i < MOEC_COUNT(e->scratch); i++)
        moec_free(e->scratch[i].p);
    for (size_t i = 0; i < MOEC_COUNT(e->rewritten); i++)
        moec_free(e->rewritten[i].p);
    moec__merger_free(e->merger);
    moec__matcher_free(e->matcher);
    moec_free(e);
}

void moec_ids_release(moec_ids *ids)
{
    moec_free(ids->id);
    *ids = (moec_ids){0};
}

typedef moec_status piece_fn(moec_encoder *e, moec__piece piece, moec_err *err);

/* Appends the ids of the tokens of `set` in a piece and gives what is between them to `rest`. */
static moec_status cut_out(moec_encoder *e, const moec__added_set *set, moec__piece in, piece_fn *rest, moec_err *err)
{
    moec_status st = MOEC_OK;
    size_t at = 0, done = 0, from = 0;
    moec__found hit = {0};
    do {
        MOEC_TRY(moec__added_next(&hit, &at, &done, set, e->matcher, in.s, in.n, err));
        size_t to = hit.token ? hit.from : in.n;
        if (from < to)
            MOEC_TRY(rest(e, (moec__piece){in.s + from, to - from, in.first && from == 0}, err));
        if (hit.token && e->out->n < e->limit) /* else what is in front may have been cut short */
            MOEC_TRY(moec__ids_add(e->out, hit.token->id, err));
        from = done;
    } while (hit.token && e->out->n < e->limit);
done:
    return st;
}

static moec_status pre_tokenize(moec_encoder *e, moec__piece piece, moec_err *err)
{
    return moec__pass_on(e, 0, piece, err);
}

static moec_status normalize(moec_encoder *e, moec__piece piece, moec_err *err)
{
    moec__piece normal;
    moec_status st = moec__normalize(&normal, e, piece, err);
    return st == MOEC_OK ? cut_out(e, &e->t->normal, normal, pre_tokenize, err) : st;
}

static moec_status add_special(moec_ids *out, const moec_ids *special, moec_err *err)
{
    moec_status st = MOEC_OK;
    for (size_t i = 0; i < special->n && st == MOEC_OK; i++)
        st = moec__ids_add(out, special->id[i], err);
    return st;
}

moec_status moec_encode(moec_ids *ids, uint64_t *n_invalid, moec_encoder *e, const char *text, size_t len,
                        const moec_encode_opts *opts, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec__buf repaired = {0};
    size_t before = ids->n;
    uint64_t n_bad = 0;
    bool special = opts && opts->add_special;
    e->out = ids;
    e->limit = opts && opts->max_ids > 0 && opts->max_ids < SIZE_MAX - before ? before + opts->max_ids : SIZE_MAX;
    if (moec__utf8_check(text, len) < len) {
        MOEC_TRY(moec__utf8_repair(&repaired, &n_bad, text, len, err));
        text = repaired.p;
        len = repaired.n;
    }
    if (special)
        MOEC_TRY(add_special(ids, &e->t->before, err));
    MOEC_TRY(cut_out(e, &e->t->raw, (moec__piece){text, len, true}, normalize, err));
    if (special)
        MOEC_TRY(add_special(ids, &e->t->behind, err));
    if (n_invalid)
        *n_invalid += n_bad;
done:
    if (st != MOEC_OK)
        ids->n = before;
    moec_free(repaired.p);
    return st;
}
