/* Do statistics belong to a model? */
#include "calib/stats_internal.h"

#include "base/mem.h"

#include <string.h>

static moec_status other_model(const char *what, moec_err *err)
{
    return moec_fail(err, MOEC_EFORMAT, "statistics of another model: %s", what);
}

moec_status moec_router_rule(char **out, const moec_model *m, moec_err *err)
{
    static const char *const scores[] = {
        [MOEC_SCORE_SOFTMAX] = "softmax", [MOEC_SCORE_SIGMOID] = "sigmoid", [MOEC_SCORE_RELU] = "relu"};
    static const char *const choices[] = {
        [MOEC_CHOOSE_TOP_K] = "top_k", [MOEC_CHOOSE_TOP_K_SOFTMAX] = "top_k_softmax", [MOEC_CHOOSE_TOP_P] = "top_p",
        [MOEC_CHOOSE_POSITIVE] = "positive", [MOEC_CHOOSE_SPARSEMIXER] = "sparsemixer"};
    const moec_family *f = m->family;
    const moec_dims *d = &m->dims;
    moec_json *o = moec_json_new_object();
    moec_json_set(o, "score", moec_json_new_string(scores[f->score]));
    moec_json_set(o, "top_k", moec_json_new_int(d->top_k));
    moec_json_set(o, "renormalised", moec_json_new_bool(d->renorm));
    const moec_choice choice = d->top_k_softmax ? MOEC_CHOOSE_TOP_K_SOFTMAX : f->choice;
    if (choice != MOEC_CHOOSE_TOP_K) /* the plain rule's text is that of files which knew no other */
        moec_json_set(o, "choice", moec_json_new_string(choices[choice]));
    if (f->choice == MOEC_CHOOSE_TOP_P)
        moec_json_set(o, "top_p", moec_json_new_real(d->top_p));
    if (f->choice == MOEC_CHOOSE_SPARSEMIXER)
        moec_json_set(o, "jitter", moec_json_new_real(d->jitter));
    if (d->groups > 1) {
        moec_json_set(o, "groups", moec_json_new_int(d->groups));
        moec_json_set(o, "top_groups", moec_json_new_int(d->top_groups));
    }
    if (d->null_experts > 0)
        moec_json_set(o, "null_experts", moec_json_new_int(d->null_experts));
    if (d->logit_std > 0.0)
        moec_json_set(o, "logit_std", moec_json_new_real(d->logit_std));
    if (d->input_scale != 1.0)
        moec_json_set(o, "input_scale", moec_json_new_real(d->input_scale));
    if (d->route_scale != 1.0)
        moec_json_set(o, "scale", moec_json_new_real(d->route_scale));
    if (f->weight_on_input)
        moec_json_set(o, "weight_on", moec_json_new_string("input"));
    moec_status st = moec_json_dump(out, o, 0, err);
    moec_json_free(o);
    return st;
}

/* The fingerprint covers tensors; a config.json that was edited to route otherwise shows here. */
static moec_status check_rule(const moec_stats_meta *a, const moec_model *m, moec_err *err)
{
    char *rule;
    moec_status st = moec_router_rule(&rule, m, err);
    if (st != MOEC_OK)
        return st;
    if (strcmp(a->router_rule, rule) != 0)
        st = moec_fail(err, MOEC_EFORMAT, "statistics of another model: router rule %.200s, the model has %.200s",
                       a->router_rule, rule);
    moec_free(rule);
    return st;
}

moec_status moec_stats_check(const moec_stats *s, const moec_model *m, moec_err *err)
{
    moec_digest id;
    const moec_stats_meta *a = &s->meta;
    const moec_dims *b = &m->dims;
    const struct {
        const char *name;
        int64_t have, want;
    } size[] = {
        {"layers", a->layers, b->layers},    {"MoE layers", a->moe_layers, m->moe_layers},
        {"experts", a->experts, b->experts}, {"top-k", a->top_k, b->top_k < b->experts ? b->top_k : b->experts},
        {"hidden", a->hidden, b->hidden},    {"expert width", a->expert_width, b->expert_width},
    };
    for (size_t i = 0; i < MOEC_COUNT(size); i++)
        if (size[i].have != size[i].want)
            return moec_fail(err, MOEC_EFORMAT, "statistics of another model: %s is %lld, the model has %lld",
                             size[i].name, (long long)size[i].have, (long long)size[i].want);
    for (int64_t l = 0; l < a->moe_layers; l++)
        if (m->layer[a->moe_layer[l]].moe_index != l)
            return other_model("the MoE layers are others", err);
    if (strcmp(a->model_type, m->family->model_type) != 0)
        return moec_fail(err, MOEC_EFORMAT, "statistics of another model: of type %s, the model is %s", a->model_type,
                         m->family->model_type);
    moec_status st = check_rule(a, m, err);
    if (st == MOEC_OK)
        st = moec_ckpt_fingerprint(&id, m->ckpt, err);
    if (st != MOEC_OK)
        return st;
    if (strcmp(a->model, id.hex) != 0)
        return moec_fail(err, MOEC_EFORMAT, "statistics of another model: fingerprint %s, the model has %s", a->model,
                         id.hex);
    return moec__stats_values_check(s, MOEC_ENUMERIC, err);
}
