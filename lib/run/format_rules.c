/* Which modules have which width, as the patterns that config.json says it by; see format_parts.h. */
#include "run/format_parts.h"

#include "base/mem.h"

#include <stdio.h>
#include <string.h>

enum { AS_IT_IS = 16, GATE_UP = 3, DOWN = 4, ALL = 7 };

void moec__rules_release(moec_rules *r)
{
    for (size_t i = 0; i < r->n; i++)
        moec_free(r->at[i].pattern);
    moec_free(r->at);
    *r = (moec_rules){0};
}

/* --- text ------------------------------------------------------------------------------------------------------------ */

typedef struct text {
    char *at;
    size_t n, cap;
} text;

static moec_status put(text *t, const char *s, size_t n, moec_err *err)
{
    moec_status st = MOEC_GROW(t->at, t->cap, t->n + n + 1, err);
    if (st != MOEC_OK)
        return st;
    memcpy(t->at + t->n, s, n);
    t->n += n;
    t->at[t->n] = '\0';
    return MOEC_OK;
}

static moec_status put_text(text *t, const char *s, moec_err *err)
{
    return put(t, s, strlen(s), err);
}

/* Part of a name, its dots escaped; names of tensors have no other letter that patterns use but in families that are not written. */
static moec_status put_name(text *t, const char *s, size_t n, moec_err *err)
{
    moec_status st = MOEC_OK;
    for (size_t i = 0; st == MOEC_OK && i < n; i++)
        st = s[i] == '.' ? put(t, "\\.", 2, err) : put(t, s + i, 1, err);
    return st;
}

static moec_status put_number(text *t, const char *before, int64_t v, moec_err *err)
{
    char word[40];
    snprintf(word, sizeof word, "%s%lld", before, (long long)v);
    return put_text(t, word, err);
}

/* Takes the text over. */
static moec_status add(moec_rules *out, text *t, int bits, int64_t group, bool experts, moec_err *err)
{
    moec_status st = MOEC_GROW(out->at, out->cap, out->n + 1, err);
    if (st != MOEC_OK)
        return st;
    out->at[out->n++] = (moec_rule){t->at, bits, group, experts};
    *t = (text){0};
    return MOEC_OK;
}

/* --- experts --------------------------------------------------------------------------------------------------------- */

/* A layer's experts, and one way of holding them. */
typedef struct class {
    const moec_plan *p;
    const moec_model *m;
    int64_t moe;         /* number of the MoE layer */
    int bits;
    uint32_t projections; /* that have this group */
    int64_t group;
} class;

/* Which of the class's projections an expert has so; bit 0 gate, 1 up, 2 down. */
static uint32_t has(const class *c, int64_t e)
{
    const uint8_t *bits = c->p->quant.expert + (c->moe * c->m->dims.experts + e) * 3;
    uint32_t set = 0;
    for (int k = 0; k < 3; k++)
        set |= bits[k] == c->bits && (c->projections >> k & 1) ? 1u << k : 0;
    return set;
}

/* "^model\.layers\.7\.mlp\.experts\.(?:0|5)\.(?:gate|up|down)_proj$"; of whole layers also the module of all experts, by which
 * servers ask that have one kernel for them. */
static moec_status put_experts(text *t, const class *c, uint32_t set, bool whole, moec_err *err)
{
    static const char *const names[] = {"gate", "up", "down"};
    static const char word[] = ".experts";
    moec_status st = MOEC_OK;
    char *module = NULL;
    const int64_t layer = c->p->layer[c->moe].layer;
    const char *bar = "";
    MOEC_TRY(moec_expert_module(&module, c->m, layer, 0, 0, false, err));
    const char *front = strstr(module, word);
    if (!front)
        MOEC_TRY(moec_fail(err, MOEC_EINVAL, "%s: no experts in its name", module));
    MOEC_TRY(put_text(t, "^", err));
    MOEC_TRY(put_name(t, module, (size_t)(front - module) + sizeof word - 1, err));
    MOEC_TRY(put_text(t, whole ? "(?:\\.\\d+\\.(?:" : "\\.(?:", err));
    for (int64_t e = 0; !whole && e < c->m->dims.experts; e++)
        if (has(c, e) == set) {
            MOEC_TRY(put_number(t, bar, e, err));
            bar = "|";
        }
    MOEC_TRY(put_text(t, whole ? "" : ")\\.(?:", err));
    bar = "";
    for (int k = 0; k < 3; k++)
        if (set >> k & 1) {
            MOEC_TRY(put_text(t, bar, err));
            MOEC_TRY(put_text(t, names[k], err));
            bar = "|";
        }
    MOEC_TRY(put_text(t, whole ? ")_proj)?$" : ")_proj$", err));
done:
    moec_free(module);
    return st;
}

static moec_status add_class(moec_rules *out, const class *c, moec_err *err)
{
    moec_status st = MOEC_OK;
    text t = {0};
    for (uint32_t set = ALL; set > 0; set--) {
        int64_t n = 0;
        for (int64_t e = 0; e < c->m->dims.experts; e++)
            n += has(c, e) == set;
        if (n == 0)
            continue;
        MOEC_TRY(put_experts(&t, c, set, set == ALL && n == c->m->dims.experts, err));
        MOEC_TRY(add(out, &t, c->bits, c->group, true, err));
    }
done:
    moec_free(t.at);
    return st;
}

static moec_status add_layer(moec_rules *out, const moec_plan *p, const moec_model *m, const moec_qformat *f, int64_t moe,
                             moec_err *err)
{
    moec_status st = MOEC_OK;
    const int64_t in = moec_qformat_grid(f, &p->quant, m->dims.hidden, 4).group;
    const int64_t down = moec_qformat_grid(f, &p->quant, m->dims.expert_width, 4).group;
    for (int bits = 1; st == MOEC_OK && bits <= AS_IT_IS; bits = bits == MOEC_QUANT_BITS ? AS_IT_IS : bits + 1) {
        class c = {.p = p, .m = m, .moe = moe, .bits = bits, .projections = ALL, .group = in};
        if (in == down || bits == AS_IT_IS) {
            st = add_class(out, &c, err);
            continue;
        }
        c.projections = GATE_UP;
        st = add_class(out, &c, err);
        c.projections = DOWN;
        c.group = down;
        if (st == MOEC_OK)
            st = add_class(out, &c, err);
    }
    return st;
}

/* --- other matrices -------------------------------------------------------------------------------------------------- */

static int width_at(const moec_plan *p, int64_t layer, int which)
{
    const int bits = p->quant.mat[layer * MOEC_MAT_COUNT + which];
    return bits == AS_IT_IS ? 0 : bits;
}

/* "^model\.layers\.(?:0|1)\.self_attn\.q_proj$" of the layers that have `which` in so many bits. */
static moec_status add_matrix(moec_rules *out, const moec_plan *p, const moec_model *m, const moec_qformat *f, int which, int bits,
                              moec_err *err)
{
    static const char word[] = "layers.", tail[] = ".weight";
    moec_status st = MOEC_OK;
    text t = {0};
    const moec_weight *w = NULL;
    const char *bar = "";
    for (int64_t l = 0; l < p->quant.n_mat_layers; l++) {
        if (width_at(p, l, which) != bits)
            continue;
        const char *name = m->layer[l].mat[which].of->name, *digits = strstr(name, word);
        if (!digits)
            MOEC_TRY(moec_fail(err, MOEC_EINVAL, "tensor %s: no layer's number in its name", name));
        if (!w) {
            MOEC_TRY(put_text(&t, "^", err));
            MOEC_TRY(put_name(&t, name, (size_t)(digits - name) + sizeof word - 1, err));
            MOEC_TRY(put_text(&t, "(?:", err));
        }
        w = &m->layer[l].mat[which];
        MOEC_TRY(put_number(&t, bar, l, err));
        bar = "|";
    }
    if (!w)
        goto done;
    const char *rest = strstr(w->of->name, word) + sizeof word - 1;
    rest += strspn(rest, "0123456789");
    MOEC_TRY(put_text(&t, ")", err));
    MOEC_TRY(put_name(&t, rest, strlen(rest) - (sizeof tail - 1), err));
    MOEC_TRY(put_text(&t, "$", err));
    MOEC_TRY(add(out, &t, bits, moec_qformat_grid(f, &p->quant, w->cols, bits).group, false, err));
done:
    moec_free(t.at);
    return st;
}

moec_status moec__rules_of(moec_rules *out, const moec_plan *p, const moec_model *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_qformat *f;
    *out = (moec_rules){0};
    MOEC_TRY(moec_qformat_take(&f, p->quant.format, err));
    for (int64_t i = 0; i < p->n_layers; i++)
        MOEC_TRY(add_layer(out, p, m, f, i, err));
    for (int which = 0; p->quant.mat && which < MOEC_MAT_COUNT; which++)
        for (int bits = 1; bits <= MOEC_QUANT_BITS; bits++)
            MOEC_TRY(add_matrix(out, p, m, f, which, bits, err));
done:
    if (st != MOEC_OK)
        moec__rules_release(out);
    return st;
}

moec_status moec__experts_pattern(char **out, const moec_plan *p, moec_err *err)
{
    moec_status st = MOEC_OK;
    text t = {0};
    MOEC_TRY(put_text(&t, "model\\.layers\\.(?:", err));
    for (int64_t i = 0; i < p->n_layers; i++)
        MOEC_TRY(put_number(&t, i > 0 ? "|" : "", p->layer[i].layer, err));
    MOEC_TRY(put_text(&t, ")\\.[^.]+\\.experts", err));
    *out = t.at;
    t.at = NULL;
done:
    moec_free(t.at);
    return st;
}

int moec__usual_bits(const moec_plan *p, const moec_model *m)
{
    int64_t count[MOEC_QUANT_BITS + 1] = {0};
    int most = 4;
    for (int64_t i = 0; i < p->n_layers * m->dims.experts * 3; i++)
        if (p->quant.expert[i] <= MOEC_QUANT_BITS)
            count[p->quant.expert[i]]++;
    for (int b = 1; b <= MOEC_QUANT_BITS; b++)
        most = count[b] > count[most] ? b : most;
    return most;
}

moec_status moec__check_text_model(const moec_model *m, const char *format, moec_err *err)
{
    if (strcmp(m->prefix, "model.") == 0 && !m->config_at[0])
        return MOEC_OK;
    return moec_fail(err, MOEC_EINVAL, "--format %s: a language model inside a larger one (tensors under %s), which was not tried; "
                     "--format fake loads", format, m->prefix);
}
