/* Does a plan fit a model, and what a plan says of its output. */
#include "method/factor.h"
#include "method/plan_quant.h"

#include <stdio.h>
#include <string.h>

static const char sets_differ[] = "clients load one count for all layers";

int64_t moec_plan_least(const moec_plan *p)
{
    int64_t least = p->layer[0].n_keep;
    for (int64_t i = 1; i < p->n_sets; i++)
        least = p->layer[i].n_keep < least ? p->layer[i].n_keep : least;
    return least;
}

int64_t moec_plan_most(const moec_plan *p)
{
    int64_t most = p->layer[0].n_keep;
    for (int64_t i = 1; i < p->n_sets; i++)
        most = p->layer[i].n_keep > most ? p->layer[i].n_keep : most;
    return most;
}

int64_t moec_plan_total(const moec_plan *p)
{
    int64_t n = 0;
    for (int64_t i = 0; i < p->n_layers; i++)
        n += p->layer[i].n_keep;
    return n;
}

bool moec_plan_even(const moec_plan *p)
{
    return moec_plan_least(p) == moec_plan_most(p);
}

int64_t moec_plan_experts(const moec_plan *p)
{
    return p->mapped ? p->layer[0].n_experts : p->pad > 0 ? p->pad : p->layer[0].n_keep;
}

int64_t moec_plan_dead(const moec_plan *p)
{
    int64_t dead = 0;
    for (int64_t i = 0; p->pad > 0 && i < p->n_sets; i++)
        dead += p->pad - p->layer[i].n_keep;
    return dead;
}

const moec_layer *moec_set_layer(const moec_model *m, int64_t set)
{
    const moec_set *s = &m->set[set];
    if (s->kind != MOEC_SET_MTP)
        return &m->layer[s->layer];
    for (int64_t i = 0; i < m->mtp_layers; i++)
        if (m->mtp[i].index == s->layer)
            return &m->mtp[i];
    return NULL;
}

/* --- groups ---------------------------------------------------------------------------------------------------------- */

static int64_t least_in_group(const moec_model *m)
{
    return m->family->group == MOEC_GROUP_TOP2 ? 2 : 1;
}

static bool groups_hold(const moec_model *m, int64_t keep, int64_t top_k)
{
    const moec_dims *d = &m->dims;
    int64_t each = keep / d->groups;
    return keep % d->groups == 0 && each >= least_in_group(m) && top_k <= d->top_groups * each;
}

moec_status moec_plan_check_groups(const moec_model *m, int64_t keep, int64_t top_k, moec_err *err)
{
    const moec_dims *d = &m->dims;
    if (d->groups <= 1 || keep == d->experts || groups_hold(m, keep, top_k))
        return MOEC_OK;
    char list[64] = "";
    size_t n = 0;
    int64_t below = keep / d->groups * d->groups;
    for (int64_t k = below; k > 0 && n == 0; k -= d->groups) /* the next one below, and the next two above */
        if (groups_hold(m, k, top_k))
            n += (size_t)snprintf(list + n, sizeof list - n, "%lld", (long long)k);
    int found = 0;
    for (int64_t k = below + d->groups; k <= d->experts && found < 2; k += d->groups)
        if (groups_hold(m, k, top_k) || k == d->experts) {
            n += (size_t)snprintf(list + n, sizeof list - n, "%s%lld", n ? ", " : "", (long long)k);
            found++;
        }
    return moec_fail(err, MOEC_EINVAL,
                     "%lld experts do not fit the router's %lld groups, of which it takes %lld: every group must keep the "
                     "same number, at least %lld, and the chosen groups must hold top-k %lld. Counts that work: %s; or "
                     "--groups drop, which chooses among all experts at once and changes the routing",
                     (long long)keep, (long long)d->groups, (long long)d->top_groups, (long long)least_in_group(m),
                     (long long)top_k, list);
}

/* Every group must keep the same number: clients cut the list of experts into equal parts. */
static moec_status check_members(const moec_plan_layer *l, const moec_model *m, moec_err *err)
{
    int64_t each = l->n_keep / m->dims.groups, width = l->n_experts / m->dims.groups;
    for (int64_t k = 0; k < l->n_keep; k++)
        if (l->keep[k] / width != k / each)
            return moec_fail(err, MOEC_EFORMAT,
                             "plan: %s layer %lld: its groups of experts do not keep %lld each; that, or \"groups\": "
                             "\"drop\", is needed", moec_set_name(l->kind), (long long)l->layer, (long long)each);
    return MOEC_OK;
}

static moec_status check_groups(const moec_plan *p, const moec_model *m, moec_err *err)
{
    moec_status st = MOEC_OK;
    if (p->drop_groups && m->dims.groups <= 1)
        return moec_fail(err, MOEC_EFORMAT, "plan: groups is drop, but the router of this model has no groups");
    if (p->drop_groups || p->mapped || m->dims.groups <= 1) /* mapped, the router chooses among as many as before */
        return MOEC_OK;
    for (int64_t i = 0; st == MOEC_OK && i < p->n_sets; i++) {
        const moec_plan_layer *l = &p->layer[i];
        if (l->kind == MOEC_SET_HEADS)
            continue;
        if (moec_plan_check_groups(m, l->n_keep, p->new_top_k, err) != MOEC_OK)
            return moec_fail(err, MOEC_EFORMAT, "plan: layer %lld: %s", (long long)l->layer, err ? err->text : "");
        st = check_members(l, m, err);
    }
    return st;
}

/* --- padding --------------------------------------------------------------------------------------------------------- */

moec_status moec_plan_check_pad(const moec_model *m, bool drop_groups, int64_t pad, moec_err *err)
{
    const bool softmax = m->family->score == MOEC_SCORE_SOFTMAX;
    if (pad > m->dims.experts)
        return moec_fail(err, MOEC_EINVAL, "padding to %lld experts a layer: the model has %lld", (long long)pad,
                         (long long)m->dims.experts);
    if (m->dims.groups > 1 && !drop_groups && pad % m->dims.groups != 0)
        return moec_fail(err, MOEC_EINVAL, "padding to %lld experts a layer: the router chooses among %lld groups of the same "
                         "size, so it must be a multiple of %lld (or --groups drop)", (long long)pad,
                         (long long)m->dims.groups, (long long)m->dims.groups);
    for (int64_t i = 0; i < m->sets; i++) {
        const moec_layer *l = moec_set_layer(m, i);
        const bool heads = m->set[i].kind == MOEC_SET_HEADS;
        if (!heads && l && l->bias[MOEC_MAT_ROUTER])
            continue;
        if (heads || !l || !l->vec[MOEC_VEC_SELECTION_BIAS])
            return moec_fail(err, MOEC_EINVAL, "padding: layer %lld: its router has no bias that could keep a dead expert "
                             "from being chosen; a zero row is chosen whenever the others are negative",
                             (long long)m->set[i].layer);
        if (softmax)
            return moec_fail(err, MOEC_EINVAL, "padding: layer %lld: scores are a softmax over all experts, and dead ones "
                             "would share its denominator", (long long)m->set[i].layer);
    }
    return MOEC_OK;
}

/* --- all of it ------------------------------------------------------------------------------------------------------- */

static moec_status check_set(const moec_plan *p, int64_t i, const moec_model *m, moec_err *err)
{
    const moec_plan_layer *l = &p->layer[i];
    const moec_set *s = &m->set[i];
    if (i < p->n_layers && (l->layer != s->layer || l->kind != s->kind))
        return moec_fail(err, MOEC_EFORMAT, "plan: layer %lld is no layer with experts in this model, or one is missing before "
                         "it", (long long)l->layer);
    if (l->layer != s->layer || l->kind != s->kind)
        return moec_fail(err, MOEC_EFORMAT, "plan: others: %s layer %lld stands where the model has %s layer %lld",
                         moec_set_name(l->kind), (long long)l->layer, moec_set_name(s->kind), (long long)s->layer);
    if (l->n_experts != m->dims.experts)
        return moec_fail(err, MOEC_EFORMAT, "plan: layer %lld is for %lld experts, the model has %lld",
                         (long long)l->layer, (long long)l->n_experts, (long long)m->dims.experts);
    if (p->pad > 0 && l->n_keep > p->pad)
        return moec_fail(err, MOEC_EFORMAT, "plan: layer %lld keeps %lld experts, more than the %lld of pad",
                         (long long)l->layer, (long long)l->n_keep, (long long)p->pad);
    return MOEC_OK;
}

/* What is said of the sets that calibration does not see. */
static moec_status check_others(const moec_plan *p, const moec_model *m, moec_err *err)
{
    int64_t mtp = 0, want = m->sets;
    for (int64_t i = 0; i < m->sets; i++)
        mtp += m->set[i].kind == MOEC_SET_MTP;
    if (mtp > 0 && p->mtp == MOEC_PLAN_MTP_UNSAID)
        return moec_fail(err, MOEC_EFORMAT, "plan: the model has %lld multi-token-prediction layers, and nothing says what "
                         "becomes of them (\"mtp\": \"keep\" or \"drop\")", (long long)mtp);
    if (mtp == 0 && p->mtp != MOEC_PLAN_MTP_UNSAID)
        return moec_fail(err, MOEC_EFORMAT, "plan: mtp is said, but the model has no multi-token-prediction layers");
    if (p->mtp == MOEC_PLAN_MTP_DROP)
        want -= mtp;
    if (p->n_sets != want)
        return moec_fail(err, MOEC_EFORMAT, "plan: others has %lld sets, the model has %lld attention experts and "
                         "multi-token-prediction layers that stay", (long long)(p->n_sets - p->n_layers),
                         (long long)(want - m->moe_layers));
    return MOEC_OK;
}

bool moec_top_k_may_shrink(const moec_model *m)
{
    for (int64_t i = m->moe_layers; i < m->sets; i++)
        if (m->set[i].kind == MOEC_SET_HEADS)
            return false;
    return m->family->choice != MOEC_CHOOSE_SPARSEMIXER && m->family->key_top_k[0];
}

moec_status moec_plan_set_top_k(moec_plan *p, const moec_model *m, int64_t k, moec_err *err)
{
    if (k > p->new_top_k)
        return moec_fail(err, MOEC_EINVAL, "--top-k %lld: a token uses %lld expert%s%s", (long long)k, (long long)p->new_top_k,
                         p->new_top_k == 1 ? "" : "s", p->new_top_k < p->top_k ? " after the removal" : "");
    if (m->dims.slots != m->dims.top_k)
        return moec_fail(err, MOEC_EINVAL, "--top-k: the number of experts of a token varies in this model, top-k does not decide it");
    if (k < p->top_k && !moec_top_k_may_shrink(m))
        return moec_fail(err, MOEC_EINVAL, "--top-k %lld: top-k of this model cannot change from %lld, its router or attention is "
                         "built for it", (long long)k, (long long)p->top_k);
    p->new_top_k = k;
    return MOEC_OK;
}

static moec_status check_top_k(const moec_plan *p, const moec_model *m, moec_err *err)
{
    if (p->top_k != m->dims.top_k)
        return moec_fail(err, MOEC_EFORMAT, "plan: top_k is %lld, the model has %lld", (long long)p->top_k,
                         (long long)m->dims.top_k);
    if (!p->mapped && p->new_top_k > moec_plan_least(p))
        return moec_fail(err, MOEC_EFORMAT, "plan: new_top_k is %lld, more than the %lld experts that are kept",
                         (long long)p->new_top_k, (long long)moec_plan_least(p));
    if (p->new_top_k != p->top_k && !moec_top_k_may_shrink(m))
        return moec_fail(err, MOEC_EFORMAT, "plan: new_top_k is %lld, but top-k of this model cannot change from %lld: its "
                         "form depends on it", (long long)p->new_top_k, (long long)p->top_k);
    return MOEC_OK;
}

bool moec_plan_brings_code(const moec_plan *p)
{
    return p->factor.kept || p->mapped;
}

/* Nothing but experts' matrices changes. */
static moec_status check_map(const moec_plan *p, const moec_model *m, moec_err *err)
{
    const uint32_t matrices = MOEC_PART_GATE | MOEC_PART_UP | MOEC_PART_DOWN;
    const char *why = p->mapped ? moec_factor_refused(m) : NULL;
    if (!p->mapped)
        return MOEC_OK;
    if (why)
        return moec_fail(err, MOEC_EFORMAT, "plan: emit map: %s: %s", m->family->model_type, why);
    if (p->pad > 0 || p->width > 0 || p->n_drop > 0 || p->betas || p->factor.kind != MOEC_FACTOR_NONE || p->new_top_k != p->top_k)
        return moec_fail(err, MOEC_EFORMAT, "plan: emit map does not go with pad, expert_width, drop_layers, betas, factor or another "
                         "top-k");
    for (int64_t i = 0; i < p->n_sets; i++) {
        const moec_plan_layer *l = &p->layer[i];
        if ((l->rewritten & ~matrices) != 0 || (i >= p->n_layers && (l->rewritten || l->n_keep < l->n_experts)))
            return moec_fail(err, MOEC_EFORMAT, "plan: %s layer %lld: emit map changes gate, up and down of MoE layers and nothing "
                             "else", moec_set_name(l->kind), (long long)l->layer);
        for (int64_t e = 0; l->into && e < l->n_experts; e++)
            if (moec_plan_kept(p, i, l->into[e]) < 0 || (moec_plan_kept(p, i, e) >= 0) != (l->into[e] == e))
                return moec_fail(err, MOEC_EFORMAT, "plan: layer %lld: emit map: expert %lld is neither kept nor merged into a kept one",
                                 (long long)l->layer, (long long)e);
    }
    return MOEC_OK;
}

const char *moec_plan_kind(const moec_plan *p)
{
    return p->quant.format[0] ? "quantize" : moec_plan_merges(p) ? "merge" : p->factor.kind != MOEC_FACTOR_NONE ? "factor" : "prune";
}

bool moec_plan_merges(const moec_plan *p)
{
    for (int64_t i = 0; i < p->n_sets; i++)
        if (p->layer[i].into)
            return true;
    return false;
}

bool moec_plan_rewrites(const moec_plan *p)
{
    for (int64_t i = 0; i < p->n_sets; i++)
        if (p->layer[i].rewritten)
            return true;
    return false;
}

/* --- width and layers ------------------------------------------------------------------------------------------------ */

static bool key_there(const moec_model *m, const char *key)
{
    return key && !moec_json_absent(moec_json_path(m->config, key));
}

moec_status moec_plan_check_width(int64_t *shared, const moec_model *m, int64_t width, moec_err *err)
{
    const moec_family *f = m->family;
    bool heads = false, shares = false, dense = false;
    *shared = -1;
    for (int64_t i = 0; i < m->sets; i++)
        heads = heads || m->set[i].kind == MOEC_SET_HEADS;
    for (int64_t i = 0; i < m->dims.layers; i++) {
        shares = shares || m->layer[i].mat[MOEC_MAT_SHARED_DOWN].of;
        dense = dense || m->layer[i].mat[MOEC_MAT_DENSE_DOWN].of;
    }
    if (heads)
        return moec_fail(err, MOEC_EINVAL, "neurons of experts: this model has attention experts, whose width is that of its keys "
                         "and values");
    for (int i = 0; i < MOEC_KEY_ALIASES && f->key_expert_width[i] && dense; i++)
        if (f->key_dense_width && strcmp(f->key_expert_width[i], f->key_dense_width) == 0)
            return moec_fail(err, MOEC_EINVAL, "neurons of experts: %s of config.json is the width of dense layers, too",
                             f->key_dense_width);
    if (!shares || (f->key_shared_width && key_there(m, f->key_shared_width)))
        return MOEC_OK;
    if (!f->key_shared_count[0] || f->key_shared_width || f->key_expert_width[1])
        return moec_fail(err, MOEC_EINVAL, "neurons of experts: the shared expert's width follows %s of config.json, and would "
                         "change with it", f->key_expert_width[0]);
    if (m->dims.shared_width % width != 0)
        return moec_fail(err, MOEC_EINVAL, "neurons of experts: the shared expert is %s * %s = %lld wide, which must stay; %lld is "
                         "no divisor of it", f->key_shared_count[0], f->key_expert_width[0], (long long)m->dims.shared_width,
                         (long long)width);
    *shared = m->dims.shared_width / width;
    return MOEC_OK;
}

int64_t moec_plan_layer_number(const moec_plan *p, int64_t layer)
{
    int64_t number = layer;
    for (int64_t i = 0; i < p->n_drop && p->drop[i] <= layer; i++) {
        if (p->drop[i] == layer)
            return -1;
        number--;
    }
    return number;
}

static moec_status check_drop(const moec_plan *p, const moec_model *m, moec_err *err)
{
    int64_t left = 0;
    if (p->n_drop == 0)
        return MOEC_OK;
    if (p->drop[p->n_drop - 1] >= m->dims.layers)
        return moec_fail(err, MOEC_EFORMAT, "plan: drop_layers has layer %d, the model has %lld", (int)p->drop[p->n_drop - 1],
                         (long long)m->dims.layers);
    for (int64_t i = 0; i < m->dims.layers; i++)
        left += m->layer[i].expert && moec_plan_layer_number(p, i) >= 0;
    if (left == 0)
        return moec_fail(err, MOEC_EFORMAT, "plan: drop_layers leaves no layer with experts");
    if (p->betas || moec_plan_rewrites(p))
        return moec_fail(err, MOEC_EFORMAT, "plan: drop_layers does not go with betas or with weights that are computed anew");
    return MOEC_OK;
}

/* Weights that are computed anew are those of a folder, which the plan names by its digest. */
static moec_status check_rewritten(const moec_plan *p, const moec_model *m, moec_err *err)
{
    const uint32_t all = MOEC_PART_GATE | MOEC_PART_UP | MOEC_PART_DOWN;
    const bool anew = moec_plan_rewrites(p) || p->quant.format[0];
    if (anew != (p->weights[0] != '\0'))
        return moec_fail(err, MOEC_EFORMAT, "plan: \"rewritten\" of its layers (or \"quant\") and \"weights\" go together");
    if (p->width > m->dims.expert_width)
        return moec_fail(err, MOEC_EFORMAT, "plan: expert_width is %lld, the model's experts have %lld neurons",
                         (long long)p->width, (long long)m->dims.expert_width);
    int64_t shared;
    if (p->width > 0 && moec_plan_check_width(&shared, m, p->width, err) != MOEC_OK)
        return moec_fail(err, MOEC_EFORMAT, "plan: %s", err ? err->text : "");
    for (int64_t i = 0; p->width > 0 && i < p->n_sets; i++)
        if ((p->layer[i].rewritten & all) != all)
            return moec_fail(err, MOEC_EFORMAT, "plan: %s layer %lld: experts of another width need gate, up and down rewritten",
                             moec_set_name(p->layer[i].kind), (long long)p->layer[i].layer);
    return MOEC_OK;
}

/* Is the output the source? */
static bool keeps_all(const moec_plan *p, const moec_model *m)
{
    for (int64_t i = 0; i < p->n_sets; i++)
        if (p->layer[i].n_keep != p->layer[i].n_experts || p->layer[i].rewritten)
            return false;
    return p->n_sets == m->sets && p->n_drop == 0 && p->width == 0 && p->dtype == MOEC_DTYPE_COUNT;
}

moec_status moec_plan_check_shape(const moec_plan *p, const moec_model *m, const char *fingerprint, moec_err *err)
{
    moec_status st = MOEC_OK;
    if (p->model[0] && strcmp(p->model, fingerprint) != 0)
        return moec_fail(err, MOEC_EFORMAT, "plan: it is for another model (fingerprint %s, this one has %s)", p->model,
                         fingerprint);
    if (p->model_type[0] && strcmp(p->model_type, m->family->model_type) != 0 &&
        moec_family_find(p->model_type) != m->family)
        return moec_fail(err, MOEC_EFORMAT, "plan: it is for a model of type %s, this one is %s", p->model_type,
                         m->family->model_type);
    if (p->n_layers != m->moe_layers)
        return moec_fail(err, MOEC_EFORMAT, "plan: it has %lld layers, the model has %lld with experts",
                         (long long)p->n_layers, (long long)m->moe_layers);
    MOEC_TRY(check_others(p, m, err));
    for (int64_t i = 0; i < p->n_sets; i++)
        MOEC_TRY(check_set(p, i, m, err));
    if (m->packed && !keeps_all(p, m))
        MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "plan: the model is quantized (%s), its experts cannot be changed in codes; apply the "
                           "plan to the unquantized release and quantize that", moec_ckpt_dir(m->ckpt)));
    MOEC_TRY(check_top_k(p, m, err));
    MOEC_TRY(check_groups(p, m, err));
    MOEC_TRY(check_rewritten(p, m, err));
    MOEC_TRY(moec_factor_check(p, m, err));
    MOEC_TRY(check_map(p, m, err));
    MOEC_TRY(moec__quant_check(p, m, err));
    MOEC_TRY(check_drop(p, m, err));
    if (p->pad > 0 && moec_plan_check_pad(m, p->drop_groups, p->pad, err) != MOEC_OK)
        st = moec_fail(err, MOEC_EFORMAT, "plan: %s", err ? err->text : "");
done:
    return st;
}

moec_status moec_plan_check(const moec_plan *p, const moec_model *m, const char *fingerprint, moec_err *err)
{
    moec_status st = moec_plan_check_shape(p, m, fingerprint, err);
    for (int64_t i = 1; st == MOEC_OK && p->pad == 0 && !p->mapped && i < p->n_sets; i++) {
        const moec_plan_layer *l = &p->layer[i];
        if (l->n_keep != p->layer[0].n_keep)
            st = moec_fail(err, MOEC_EFORMAT, "plan: layer %lld keeps %lld experts, layer %lld keeps %lld; %s",
                           (long long)l->layer, (long long)l->n_keep, (long long)p->layer[0].layer,
                           (long long)p->layer[0].n_keep, sets_differ);
    }
    return st;
}

/* --- looking up ------------------------------------------------------------------------------------------------------ */

moec_slots moec_plan_slots(const moec_plan *p, const moec_model *m, int64_t l)
{
    const int64_t groups = p->pad > 0 && !p->drop_groups && m->dims.groups > 1 ? m->dims.groups : 1;
    const int64_t live = p->layer[l].n_keep / groups;
    return (moec_slots){.live = live, .size = p->pad > 0 ? p->pad / groups : live};
}

int64_t moec_slots_kept(moec_slots s, int64_t number)
{
    const int64_t group = number / s.size, at = number % s.size;
    return at < s.live ? group * s.live + at : -1;
}

int64_t moec_plan_number(const moec_plan *p, const moec_model *m, int64_t l, int64_t expert)
{
    const int64_t kept = moec_plan_kept(p, l, expert);
    const moec_slots s = moec_plan_slots(p, m, l);
    return kept < 0 ? -1 : kept / s.live * s.size + kept % s.live;
}

int64_t moec_plan_leads_to(const moec_plan *p, int64_t l, int64_t row)
{
    const moec_plan_layer *pl = &p->layer[l];
    const int64_t kept = moec_plan_kept(p, l, pl->into ? pl->into[row] : row);
    return kept >= 0 ? kept : 0;
}

int64_t moec_plan_kept(const moec_plan *p, int64_t l, int64_t expert)
{
    const moec_plan_layer *pl = &p->layer[l];
    int64_t lo = 0, hi = pl->n_keep;
    while (lo < hi) {
        int64_t mid = lo + (hi - lo) / 2;
        if (pl->keep[mid] == expert)
            return mid;
        if (pl->keep[mid] < expert)
            lo = mid + 1;
        else
            hi = mid;
    }
    return -1;
}

const moec_plan_layer *moec_plan_find(const moec_plan *p, int64_t layer)
{
    for (int64_t i = 0; i < p->n_layers; i++)
        if (p->layer[i].layer == layer)
            return &p->layer[i];
    return NULL;
}
