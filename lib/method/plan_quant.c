/* See plan_quant.h, and moec_plan_quant of plan.h. */
#include "method/plan_quant.h"

#include "base/mem.h"
#include "method/quant.h"

#include <stdio.h>
#include <string.h>

enum { AS_IT_IS = 16, MOST_GROUP = 1 << 24 };

/* Names of moec_mat in plans. */
static const char *const mats[MOEC_MAT_COUNT] = {
    [MOEC_MAT_Q] = "q", [MOEC_MAT_K] = "k", [MOEC_MAT_V] = "v", [MOEC_MAT_O] = "o", [MOEC_MAT_ATTN_GATE] = "attn_gate",
    [MOEC_MAT_Q_A] = "q_a", [MOEC_MAT_Q_B] = "q_b", [MOEC_MAT_KV_A] = "kv_a", [MOEC_MAT_KV_B] = "kv_b",
    [MOEC_MAT_CONV_IN] = "conv_in", [MOEC_MAT_CONV_OUT] = "conv_out", [MOEC_MAT_DELTA_QKV] = "delta_qkv",
    [MOEC_MAT_DELTA_Z] = "delta_z", [MOEC_MAT_DELTA_B] = "delta_b", [MOEC_MAT_DELTA_A] = "delta_a",
    [MOEC_MAT_DELTA_QKVZ] = "delta_qkvz", [MOEC_MAT_DELTA_BA] = "delta_ba", [MOEC_MAT_DELTA_OUT] = "delta_out",
    [MOEC_MAT_SHARED_GATE] = "shared_gate", [MOEC_MAT_SHARED_UP] = "shared_up", [MOEC_MAT_SHARED_DOWN] = "shared_down",
    [MOEC_MAT_DENSE_GATE] = "dense_gate", [MOEC_MAT_DENSE_UP] = "dense_up", [MOEC_MAT_DENSE_DOWN] = "dense_down"};
    /* routers, and the shared expert's gate, are never quantized */

/* --- writing --------------------------------------------------------------------------------------------------------- */

static moec_json *others_json(const moec_plan_quant *q)
{
    moec_json *a = moec_json_new_array();
    for (int64_t l = 0; q->mat && l < q->n_mat_layers; l++) {
        moec_json *o = NULL;
        for (int i = 0; i < MOEC_MAT_COUNT; i++) {
            const int bits = q->mat[l * MOEC_MAT_COUNT + i];
            if (!mats[i] || bits == 0 || bits == AS_IT_IS)
                continue;
            if (!o) {
                o = moec_json_new_object();
                moec_json_set(o, "layer", moec_json_new_int(l));
            }
            moec_json_set(o, mats[i], moec_json_new_int(bits));
        }
        if (o)
            moec_json_push(a, o);
    }
    return a;
}

moec_json *moec__quant_to_json(const moec_plan *p)
{
    const moec_plan_quant *q = &p->quant;
    moec_json *o = moec_json_new_object();
    moec_json_set(o, "format", moec_json_new_string(q->format));
    moec_json_set(o, "group_size", moec_json_new_int(q->group));
    moec_json_set(o, "zero_points", moec_json_new_bool(q->zeros));
    moec_json_set(o, "scale_dtype", moec_json_new_string(moec_plan_dtype_name(q->scale_type)));
    if (q->error)
        moec_json_set(o, "error", moec_json_new_reals(q->error, 3 * p->n_layers));
    moec_json *others = others_json(q);
    if (moec_json_len(others) > 0) {
        moec_json_set(o, "layers", moec_json_new_int(q->n_mat_layers));
        moec_json_set(o, "others", others);
    } else {
        moec_json_free(others);
    }
    return o;
}

moec_json *moec__quant_layer_to_json(const moec_plan *p, int64_t i)
{
    moec_json *a = moec_json_new_array();
    const uint8_t *bits = p->quant.expert + i * p->layer[0].n_experts * 3;
    for (int64_t e = 0; e < p->layer[i].n_experts; e++, bits += 3) {
        const int32_t three[] = {bits[0], bits[1], bits[2]};
        const bool one = bits[0] == bits[1] && bits[1] == bits[2];
        moec_json_push(a, one ? moec_json_new_int(bits[0]) : moec_json_new_ints(three, 3));
    }
    return a;
}

/* --- reading --------------------------------------------------------------------------------------------------------- */

static bool is_width(const moec_json *v, uint8_t *out)
{
    int64_t n;
    if (!moec_json_int(v, &n) || !((n >= 1 && n <= MOEC_QUANT_BITS) || n == AS_IT_IS))
        return false;
    *out = (uint8_t)n;
    return true;
}

static moec_status read_layer(uint8_t *bits, int64_t experts, const moec_reader *r, const moec_json *a, int64_t i)
{
    if (moec_json_type(a) != MOEC_JSON_ARRAY || moec_json_len(a) != (size_t)experts)
        return moec_fail(r->err, MOEC_EFORMAT, "%s: layers[%lld]: bits is not a list of %lld widths", r->what, (long long)i,
                         (long long)experts);
    for (int64_t e = 0; e < experts; e++, bits += 3) {
        const moec_json *v = moec_json_at(a, (size_t)e);
        const bool three = moec_json_type(v) == MOEC_JSON_ARRAY;
        bool ok = !three || moec_json_len(v) == 3;
        for (size_t k = 0; ok && k < 3; k++)
            ok = is_width(three ? moec_json_at(v, k) : v, &bits[k]);
        if (!ok)
            return moec_fail(r->err, MOEC_EFORMAT, "%s: layers[%lld]: bits: expert %lld has no width of 1 to %d or %d, nor three of "
                             "them", r->what, (long long)i, (long long)e, MOEC_QUANT_BITS, AS_IT_IS);
    }
    return MOEC_OK;
}

static moec_status read_layers(moec_plan *p, const moec_reader *r, const moec_json *layers)
{
    const int64_t E = p->layer[0].n_experts;
    size_t n;
    for (int64_t i = 1; i < p->n_layers; i++)
        if (p->layer[i].n_experts != E)
            return moec_fail(r->err, MOEC_EFORMAT, "%s: layers[%lld] has %lld experts, layers[0] has %lld", r->what, (long long)i,
                             (long long)p->layer[i].n_experts, (long long)E);
    if (!moec_mul_size(&n, (size_t)p->n_layers, (size_t)E * 3))
        return moec_fail(r->err, MOEC_EFORMAT, "%s: too many experts", r->what);
    moec_status st = MOEC_NEW(p->quant.expert, n, r->err);
    for (int64_t i = 0; st == MOEC_OK && i < p->n_layers; i++)
        st = read_layer(p->quant.expert + i * E * 3, E, r, moec_json_get(moec_json_at(layers, (size_t)i), "bits"), i);
    return st;
}

static moec_status read_other(moec_plan_quant *q, const moec_reader *r, moec_json *o, size_t i)
{
    char where[48];
    void *it = NULL;
    const char *key;
    moec_json *value;
    int64_t layer;
    snprintf(where, sizeof where, "quant: others[%zu]", i);
    if (moec_json_type(o) != MOEC_JSON_OBJECT)
        return moec_fail(r->err, MOEC_EFORMAT, "%s: %s is not a JSON object", r->what, where);
    moec_status st = moec__read_int(&layer, r, o, where, "layer", 0, q->n_mat_layers - 1);
    while (st == MOEC_OK && moec_json_each(o, &it, &key, &value)) {
        int k = 0;
        while (k < MOEC_MAT_COUNT && !(mats[k] && strcmp(mats[k], key) == 0))
            k++;
        if (strcmp(key, "layer") == 0)
            continue;
        if (k == MOEC_MAT_COUNT)
            return moec_fail(r->err, MOEC_EFORMAT, "%s: %s: %.40s is no matrix that is quantized", r->what, where, key);
        if (!is_width(value, &q->mat[layer * MOEC_MAT_COUNT + k]))
            return moec_fail(r->err, MOEC_EFORMAT, "%s: %s: %s is no width of 1 to %d or %d", r->what, where, key, MOEC_QUANT_BITS,
                             AS_IT_IS);
    }
    return st;
}

/* The layers of the model are counted where there are any. */
static moec_status read_others(moec_plan_quant *q, const moec_reader *r, const moec_json *o)
{
    const moec_json *a = moec_json_get(o, "others");
    moec_status st = MOEC_OK;
    if (!a && !moec_json_get(o, "layers"))
        return MOEC_OK;
    MOEC_TRY(moec__read_int(&q->n_mat_layers, r, o, "quant", "layers", 1, MOEC_READ_MAX_LAYERS));
    MOEC_TRY(MOEC_NEW(q->mat, (size_t)q->n_mat_layers * MOEC_MAT_COUNT, r->err));
    if (moec_json_type(a) != MOEC_JSON_ARRAY || moec_json_len(a) > MOEC_READ_MAX_LAYERS)
        return moec_fail(r->err, MOEC_EFORMAT, "%s: quant: others is not a list of layers", r->what);
    for (size_t i = 0; i < moec_json_len(a); i++)
        MOEC_TRY(read_other(q, r, moec_json_at(a, i), i));
done:
    return st;
}

moec_status moec__quant_read(moec_plan *p, const moec_reader *r, const moec_json *root)
{
    static const char *const known[] = {"format", "group_size", "zero_points", "scale_dtype", "error", "layers", "others"};
    moec_status st = MOEC_OK;
    moec_plan_quant *q = &p->quant;
    moec_json *o = moec_json_get(root, "quant");
    const moec_json *layers = moec_json_get(root, "layers");
    char type[8];
    for (int64_t i = 0; !o && i < p->n_layers; i++)
        if (moec_json_get(moec_json_at(layers, (size_t)i), "bits"))
            return moec_fail(r->err, MOEC_EFORMAT, "%s: layers[%lld] has bits, but nothing says how they are written (\"quant\")",
                             r->what, (long long)i);
    if (!o)
        return MOEC_OK;
    MOEC_TRY(moec__read_keys(r, o, "quant", known, MOEC_COUNT(known)));
    MOEC_TRY(moec__read_text(q->format, sizeof q->format, r, o, "format", true));
    if (!q->format[0])
        return moec_fail(r->err, MOEC_EFORMAT, "%s: quant: format is empty", r->what);
    MOEC_TRY(moec__read_int(&q->group, r, o, "quant", "group_size", 0, MOST_GROUP));
    MOEC_TRY(moec__read_text(type, sizeof type, r, o, "scale_dtype", true));
    q->scale_type = moec_plan_dtype(type);
    if (q->scale_type == MOEC_DTYPE_COUNT)
        return moec_fail(r->err, MOEC_EFORMAT, "%s: quant: scale_dtype is %s, expected bf16, f16 or f32", r->what, type);
    if (!moec_json_bool(moec_json_get(o, "zero_points"), &q->zeros))
        return moec_fail(r->err, MOEC_EFORMAT, "%s: quant: zero_points is not true or false", r->what);
    if (moec_json_get(o, "error"))
        MOEC_TRY(moec__read_reals(&q->error, 3 * p->n_layers, r, o, "quant", "error"));
    MOEC_TRY(read_layers(p, r, layers));
    MOEC_TRY(read_others(q, r, o));
done:
    return st;
}

/* --- checking -------------------------------------------------------------------------------------------------------- */

static moec_status check_widths(const moec_plan *p, const moec_model *m, moec_err *err)
{
    const moec_plan_quant *q = &p->quant;
    for (int64_t i = 0; i < p->n_layers * m->dims.experts * 3; i++) {
        const int b = q->expert[i];
        if ((b < 1 || b > MOEC_QUANT_BITS) && b != AS_IT_IS)
            return moec_fail(err, MOEC_EFORMAT, "plan: layer %lld: %d bits, expected 1 to %d or %d",
                             (long long)p->layer[i / (m->dims.experts * 3)].layer, b, MOEC_QUANT_BITS, AS_IT_IS);
        if (q->zeros && b == 1)
            return moec_fail(err, MOEC_EFORMAT, "plan: zero points need 2 bits at least, layer %lld has experts of 1",
                             (long long)p->layer[i / (m->dims.experts * 3)].layer);
    }
    for (int64_t i = 0; q->mat && i < q->n_mat_layers * MOEC_MAT_COUNT; i++) {
        const int b = q->mat[i];
        const char *name = mats[i % MOEC_MAT_COUNT];
        if (b == 0 || b == AS_IT_IS)
            continue;
        if (b > MOEC_QUANT_BITS || (q->zeros && b == 1) || !name)
            return moec_fail(err, MOEC_EFORMAT, "plan: quant: others: layer %lld: %d bits of %s", (long long)(i / MOEC_MAT_COUNT), b,
                             name ? name : "a router, which stays as it is");
        const moec_layer *l = &m->layer[i / MOEC_MAT_COUNT];
        if (!l->mat[i % MOEC_MAT_COUNT].of)
            return moec_fail(err, MOEC_EFORMAT, "plan: quant: others: layer %lld has no %s", (long long)(i / MOEC_MAT_COUNT), name);
    }
    return MOEC_OK;
}

/* Sources that hold nothing but numbers: no codes, whose errors would add up. */
static moec_status check_source(const moec_plan *p, const moec_model *m, moec_err *err)
{
    for (int64_t i = 0; i < p->n_layers; i++) {
        const moec_weight *w = &m->layer[p->layer[i].layer].expert[0].gate;
        if (w->storage != MOEC_PLAIN && (m->packed || p->dtype == MOEC_DTYPE_COUNT))
            return moec_fail(err, MOEC_EFORMAT, "plan: the source is quantized (%s); %s", w->of->name,
                             m->packed ? "use the unquantized release" : "--dtype bf16 multiplies it out");
    }
    return MOEC_OK;
}

moec_status moec__quant_check(const moec_plan *p, const moec_model *m, moec_err *err)
{
    const moec_plan_quant *q = &p->quant;
    if (!q->format[0])
        return MOEC_OK;
    for (int64_t i = 0; i < p->n_sets; i++)
        if (p->layer[i].n_keep != p->layer[i].n_experts)
            return moec_fail(err, MOEC_EFORMAT, "plan: layer %lld: quantizing keeps every expert; apply what removes them first",
                             (long long)p->layer[i].layer);
    if (p->width > 0 || p->n_drop > 0 || p->pad > 0 || p->drop_groups || moec_plan_merges(p) || p->factor.kind != MOEC_FACTOR_NONE ||
        p->mtp == MOEC_PLAN_MTP_DROP)
        return moec_fail(err, MOEC_EFORMAT, "plan: quantizing goes with nothing else that changes the model; apply that first");
    if (!q->expert || (q->mat && q->n_mat_layers != m->dims.layers))
        return moec_fail(err, MOEC_EFORMAT, "plan: quant: widths are for %lld layers, the model has %lld",
                         (long long)q->n_mat_layers, (long long)m->dims.layers);
    if (q->group < 0 || (q->scale_type != MOEC_F16 && q->scale_type != MOEC_BF16 && q->scale_type != MOEC_F32))
        return moec_fail(err, MOEC_EFORMAT, "plan: quant: group %lld, or a scale_dtype that is none", (long long)q->group);
    moec_status st = check_source(p, m, err);
    return st == MOEC_OK ? check_widths(p, m, err) : st;
}
