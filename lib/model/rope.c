/* Rotary position embedding: frequencies of every scaling kind in use, from either config dialect. */
#include "model/model.h"

#include <math.h>
#include <string.h>

static const double pi = 3.14159265358979323846;

static const struct {
    const char *name;
    moec_rope_kind kind;
} kinds[] = {
    {"default", MOEC_ROPE_DEFAULT}, {"linear", MOEC_ROPE_LINEAR}, {"dynamic", MOEC_ROPE_DYNAMIC},
    {"yarn", MOEC_ROPE_YARN},       {"llama3", MOEC_ROPE_LLAMA3}, {"longrope", MOEC_ROPE_LONGROPE},
    {"su", MOEC_ROPE_LONGROPE},     {"mrope", MOEC_ROPE_DEFAULT}, /* positions in three parts, which are equal for text */
};

/* Reads of one config: the first key that is there and no number is kept. */
typedef struct reader {
    const moec_json *scaling, *config;
    const char *bad;
} reader;

static double real_in(reader *r, const moec_json *object, const char *key, double fallback)
{
    double v = fallback;
    const moec_json *found = moec_json_get(object, key);
    if (!moec_json_absent(found) && !moec_json_real(found, &v) && !r->bad)
        r->bad = key;
    return v;
}

/* From the scaling object. */
static double scaling_real(reader *r, const char *key, double fallback)
{
    return real_in(r, r->scaling, key, fallback);
}

/* From the scaling object, or else from config.json itself. */
static double either_real(reader *r, const char *key, double fallback)
{
    return real_in(r, r->scaling, key, real_in(r, r->config, key, fallback));
}

static moec_status read_kind(moec_rope *r, const moec_json *scaling, moec_err *err)
{
    const moec_json *type = moec_json_get(scaling, "rope_type");
    if (moec_json_absent(type))
        type = moec_json_get(scaling, "type");
    const char *name = moec_json_string(type);
    r->kind = MOEC_ROPE_DEFAULT;
    if (moec_json_absent(type))
        return MOEC_OK;
    if (!name)
        return moec_fail(err, MOEC_EFORMAT, "config.json: rope type is not a text");
    for (size_t i = 0; i < MOEC_COUNT(kinds); i++)
        if (strcmp(kinds[i].name, name) == 0) {
            r->kind = kinds[i].kind;
            return MOEC_OK;
        }
    return moec_fail(err, MOEC_EFORMAT, "config.json: rope type %.40s is not known (default, linear, dynamic, yarn, llama3, "
                     "longrope)", name);
}

/* One list of longrope: a divisor for each pair. */
static moec_status read_factors(double *out, const moec_rope *r, const moec_json *scaling, const char *key, moec_err *err)
{
    const moec_json *list = moec_json_get(scaling, key);
    int64_t n = r->width / 2;
    if (moec_json_type(list) != MOEC_JSON_ARRAY || (int64_t)moec_json_len(list) != n || n > MOEC_ROPE_FACTORS)
        return moec_fail(err, MOEC_EFORMAT, "config.json: rope: %s has %zu numbers, expected %lld and at most %d", key,
                         moec_json_type(list) == MOEC_JSON_ARRAY ? moec_json_len(list) : 0, (long long)n,
                         MOEC_ROPE_FACTORS);
    for (int64_t i = 0; i < n; i++)
        if (!moec_json_real(moec_json_at(list, (size_t)i), &out[i]) || !(out[i] > 0.0 && out[i] < 1e9))
            return moec_fail(err, MOEC_EFORMAT, "config.json: rope: %s: number %lld is out of range", key, (long long)i);
    return MOEC_OK;
}

/* The numbers of all kinds; what a kind does not use keeps its default. */
static void read_numbers(moec_rope *r, reader *in, double default_theta)
{
    bool ratio = r->kind == MOEC_ROPE_YARN || r->kind == MOEC_ROPE_LONGROPE;
    r->theta = either_real(in, "rope_theta", default_theta);
    r->original = either_real(in, "original_max_position_embeddings", (double)r->max_positions);
    r->factor = scaling_real(in, "factor", ratio ? (double)r->max_positions / r->original : 1.0);
    r->low_factor = scaling_real(in, "low_freq_factor", 1.0);
    r->high_factor = scaling_real(in, "high_freq_factor", 4.0);
    r->beta_fast = scaling_real(in, "beta_fast", 32.0);
    r->beta_slow = scaling_real(in, "beta_slow", 1.0);
    r->attention_factor = scaling_real(in, "attention_factor", 0.0);
    r->mscale = scaling_real(in, "mscale", 0.0);
    r->mscale_all = scaling_real(in, "mscale_all_dim", 0.0);
    r->alpha = r->kind == MOEC_ROPE_DYNAMIC ? scaling_real(in, "alpha", 0.0) : 0.0;
    if (r->kind == MOEC_ROPE_LONGROPE) {
        r->short_mscale = scaling_real(in, "short_mscale", 0.0);
        r->long_mscale = scaling_real(in, "long_mscale", 0.0);
    }
}

static bool in_range(const moec_rope *r, double partial)
{
    const double any[] = {r->attention_factor, r->mscale, r->mscale_all, r->alpha, r->short_mscale, r->long_mscale};
    for (size_t i = 0; i < MOEC_COUNT(any); i++)
        if (!(any[i] >= 0.0 && any[i] < 1e9))
            return false;
    /* Llama 4 Scout has equal low and high factors: then no wave lies between them. */
    return r->theta > 1.0 && r->theta < 1e30 && r->factor > 0.0 && r->factor < 1e9 && r->original > 0.0 && partial > 0.0 &&
           partial <= 1.0 && r->max_positions > 0 && r->high_factor >= r->low_factor && r->low_factor > 0.0 &&
           r->beta_fast > 0.0 && r->beta_slow > 0.0 && (r->short_mscale > 0.0) == (r->long_mscale > 0.0);
}

/* Everything from one flat scaling object. */
static moec_status read_flat(moec_rope *r, const moec_json *scaling, const moec_json *config, int64_t width, double partial,
                             double default_theta, moec_err *err)
{
    reader in = {.scaling = scaling, .config = config};
    const moec_json *positions = moec_json_get(config, "max_position_embeddings");
    moec_status st = MOEC_OK;
    memset(r, 0, sizeof *r);
    MOEC_TRY(read_kind(r, scaling, err));
    r->max_positions = 2048;
    if (!moec_json_absent(positions) && !moec_json_int(positions, &r->max_positions))
        return moec_fail(err, MOEC_EFORMAT, "config.json: max_position_embeddings is not a whole number");
    double whole = (double)width, rotary = real_in(&in, config, "rotary_dim", whole * (partial > 0.0 ? partial : 1.0));
    double part = either_real(&in, "partial_rotary_factor", rotary / whole);
    read_numbers(r, &in, default_theta);
    r->truncate = true;
    const moec_json *truncate = moec_json_get(scaling, "truncate");
    if (in.bad || (!moec_json_absent(truncate) && !moec_json_bool(truncate, &r->truncate)))
        return moec_fail(err, MOEC_EFORMAT, "config.json: rope: %s is %s", in.bad ? in.bad : "truncate",
                         in.bad ? "not a number" : "neither true nor false");
    if (!in_range(r, part))
        return moec_fail(err, MOEC_EFORMAT, "config.json: rope: a number is out of range (theta %g, factor %g, original %g, "
                         "partial %g)", r->theta, r->factor, r->original, part);
    r->width = (int64_t)(whole * part + 1e-9); /* 192 * 0.334 is cut, 64 * (24/64.) is not */
    if (r->width < 2 || r->width % 2 != 0)
        return moec_fail(err, MOEC_EFORMAT, "config.json: rope: rotated width %lld is not even", (long long)r->width);
    if (r->kind == MOEC_ROPE_LONGROPE) {
        MOEC_TRY(read_factors(r->short_factor, r, scaling, "short_factor", err));
        MOEC_TRY(read_factors(r->long_factor, r, scaling, "long_factor", err));
    }
done:
    return st;
}

/* transformers 5.23 (configuration_utils, RotaryEmbeddingConfigMixin): rope_scaling, transformers 4's name, replaces
 * rope_parameters when it is there and not empty; keys missing in it are filled from config.json itself, then from the
 * family's default. Some configs have one such object for each layer type: one rotation for all layers is what we
 * compute, so they must agree. */
moec_status moec_rope_read(moec_rope *out, const moec_json *config, int64_t width, double partial, double default_theta,
                           moec_err *err)
{
    const moec_json *old = moec_json_get(config, "rope_scaling");
    bool newer = moec_json_absent(old) || (moec_json_type(old) == MOEC_JSON_OBJECT && moec_json_len(old) == 0);
    const char *from = newer ? "rope_parameters" : "rope_scaling", *key;
    moec_json *scaling = moec_json_get(config, from), *entry;
    void *it = NULL;
    const moec_json *nested = moec_json_get(scaling, "full_attention");
    if (!moec_json_absent(scaling) && moec_json_type(scaling) != MOEC_JSON_OBJECT)
        return moec_fail(err, MOEC_EFORMAT, "config.json: %s is not an object", from);
    if (moec_json_type(nested) != MOEC_JSON_OBJECT)
        return read_flat(out, scaling, config, width, partial, default_theta, err);
    moec_status st = read_flat(out, nested, config, width, partial, default_theta, err);
    while (st == MOEC_OK && moec_json_each(scaling, &it, &key, &entry)) {
        moec_rope other;
        if (moec_json_type(entry) != MOEC_JSON_OBJECT)
            continue;
        st = read_flat(&other, entry, config, width, partial, default_theta, err);
        if (st == MOEC_OK && memcmp(&other, out, sizeof other) != 0)
            st = moec_fail(err, MOEC_EFORMAT, "config.json: %s: %.40s differs from full_attention, expected one rotation for "
                           "all layers", from, key);
    }
    return st;
}

/* Dimension at which a wave makes `turns` turns over the original length. */
static double yarn_dim(const moec_rope *r, double turns)
{
    return (double)r->width * log(r->original / (turns * 2.0 * pi)) / (2.0 * log(r->theta));
}

static double yarn_mscale(double factor, double m)
{
    return factor <= 1.0 ? 1.0 : 0.1 * m * log(factor) + 1.0;
}

/* YaRN (arXiv:2309.00071): slow waves are interpolated, fast ones kept, a ramp between. */
static void yarn_table(double *inv, double *scale, const moec_rope *r)
{
    double lo = yarn_dim(r, r->beta_fast), hi = yarn_dim(r, r->beta_slow);
    if (r->truncate) {
        lo = floor(lo);
        hi = ceil(hi);
    }
    lo = fmax(lo, 0.0);
    hi = fmin(hi, (double)r->width - 1.0);
    if (lo == hi)
        hi += 0.001;
    for (int64_t i = 0; i < r->width / 2; i++) {
        double ramp = fmin(fmax(((double)i - lo) / (hi - lo), 0.0), 1.0);
        inv[i] = inv[i] / r->factor * ramp + inv[i] * (1.0 - ramp);
    }
    if (r->attention_factor > 0.0)
        *scale = r->attention_factor;
    else if (r->mscale != 0.0 && r->mscale_all != 0.0)
        *scale = yarn_mscale(r->factor, r->mscale) / yarn_mscale(r->factor, r->mscale_all);
    else
        *scale = yarn_mscale(r->factor, 1.0);
}

/* Llama 3.1: waves longer than original/low are interpolated, shorter than original/high kept, blended between. */
static void llama3_table(double *inv, const moec_rope *r)
{
    for (int64_t i = 0; i < r->width / 2; i++) {
        double wave = 2.0 * pi / inv[i];
        if (wave > r->original / r->low_factor) {
            inv[i] /= r->factor;
        } else if (wave > r->original / r->high_factor) {
            double t = (r->original / wave - r->low_factor) / (r->high_factor - r->low_factor);
            inv[i] = (1.0 - t) * inv[i] / r->factor + t * inv[i];
        }
    }
}

/* LongRoPE (arXiv:2402.13753): every wave has its own divisor, one list up to the original length and one beyond. PhiMoE as
 * transformers 5.23 runs it takes the short list at any length and only changes the scale with it. */
static void longrope_table(double *inv, double *scale, const moec_rope *r, int64_t length)
{
    bool is_long = (double)length > r->original, own_scales = r->short_mscale > 0.0;
    const double *by = is_long && !own_scales ? r->long_factor : r->short_factor;
    for (int64_t i = 0; i < r->width / 2; i++)
        inv[i] /= by[i];
    if (own_scales)
        *scale = is_long ? r->long_mscale : r->short_mscale;
    else if (r->attention_factor > 0.0)
        *scale = r->attention_factor;
    else if (r->factor > 1.0 && r->original > 1.0)
        *scale = sqrt(1.0 + log(r->factor) / log(r->original));
}

bool moec_rope_by_length(const moec_rope *r)
{
    return (r->kind == MOEC_ROPE_DYNAMIC && r->alpha == 0.0) || r->kind == MOEC_ROPE_LONGROPE;
}

void moec_rope_table(double *inv_freq, double *scale, const moec_rope *r, int64_t length)
{
    double theta = r->theta, w = (double)r->width;
    if (r->kind == MOEC_ROPE_DYNAMIC && r->width > 2) { /* NTK-aware: by length, or HunYuan's fixed alpha */
        if (r->alpha > 0.0)
            theta *= pow(r->alpha, w / (w - 2.0));
        else if (length > r->max_positions)
            theta *= pow(r->factor * (double)length / (double)r->max_positions - (r->factor - 1.0), w / (w - 2.0));
    }
    for (int64_t i = 0; i < r->width / 2; i++) {
        inv_freq[i] = pow(theta, -2.0 * (double)i / w);
        if (r->kind == MOEC_ROPE_LINEAR)
            inv_freq[i] /= r->factor;
    }
    *scale = 1.0;
    if (r->kind == MOEC_ROPE_YARN)
        yarn_table(inv_freq, scale, r);
    if (r->kind == MOEC_ROPE_LLAMA3)
        llama3_table(inv_freq, r);
    if (r->kind == MOEC_ROPE_LONGROPE)
        longrope_table(inv_freq, scale, r, length);
}
