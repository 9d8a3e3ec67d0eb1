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
    {"yarn", MOEC_ROPE_YARN},       {"llama3", MOEC_ROPE_LLAMA3},
};

/* Reads of one config: the first key that is there and no number is kept. */
typedef struct reader {
    const moec_json *scaling, *config;
    const char *bad;
} reader;

static bool is_absent(const moec_json *v)
{
    return moec_json_type(v) == MOEC_JSON_NONE || moec_json_type(v) == MOEC_JSON_NULL;
}

static double real_in(reader *r, const moec_json *object, const char *key, double fallback)
{
    double v = fallback;
    const moec_json *found = moec_json_get(object, key);
    if (!is_absent(found) && !moec_json_real(found, &v) && !r->bad)
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
    if (is_absent(type))
        type = moec_json_get(scaling, "type");
    const char *name = moec_json_string(type);
    r->kind = MOEC_ROPE_DEFAULT;
    if (is_absent(type))
        return MOEC_OK;
    if (!name)
        return moec_fail(err, MOEC_EFORMAT, "config.json: rope type is not a text");
    for (size_t i = 0; i < MOEC_COUNT(kinds); i++)
        if (strcmp(kinds[i].name, name) == 0) {
            r->kind = kinds[i].kind;
            return MOEC_OK;
        }
    return moec_fail(err, MOEC_EFORMAT, "config.json: rope type %.40s is not known (default, linear, dynamic, yarn, llama3)",
                     name);
}

moec_status moec_rope_read(moec_rope *out, const moec_json *config, int64_t width, double default_theta, moec_err *err)
{
    moec_rope *r = out;
    memset(r, 0, sizeof *r);
    /* rope_scaling is transformers 4's name and replaces rope_parameters when both are there, as transformers 5 reads it. */
    const char *from = is_absent(moec_json_get(config, "rope_scaling")) ? "rope_parameters" : "rope_scaling";
    reader in = {.scaling = moec_json_get(config, from), .config = config};
    const moec_json *positions = moec_json_get(config, "max_position_embeddings");
    if (!is_absent(in.scaling) && moec_json_type(in.scaling) != MOEC_JSON_OBJECT)
        return moec_fail(err, MOEC_EFORMAT, "config.json: %s is not an object", from);
    moec_status st = read_kind(r, in.scaling, err);
    if (st != MOEC_OK)
        return st;
    r->max_positions = 2048;
    if (!is_absent(positions) && !moec_json_int(positions, &r->max_positions))
        return moec_fail(err, MOEC_EFORMAT, "config.json: max_position_embeddings is not a whole number");
    double partial = either_real(&in, "partial_rotary_factor", 1.0);
    r->theta = either_real(&in, "rope_theta", default_theta);
    r->original = either_real(&in, "original_max_position_embeddings", (double)r->max_positions);
    r->factor = scaling_real(&in, "factor", r->kind == MOEC_ROPE_YARN ? (double)r->max_positions / r->original : 1.0);
    r->low_factor = scaling_real(&in, "low_freq_factor", 1.0);
    r->high_factor = scaling_real(&in, "high_freq_factor", 4.0);
    r->beta_fast = scaling_real(&in, "beta_fast", 32.0);
    r->beta_slow = scaling_real(&in, "beta_slow", 1.0);
    r->attention_factor = scaling_real(&in, "attention_factor", 0.0);
    r->mscale = scaling_real(&in, "mscale", 0.0);
    r->mscale_all = scaling_real(&in, "mscale_all_dim", 0.0);
    r->truncate = true;
    const moec_json *truncate = moec_json_get(in.scaling, "truncate");
    if (in.bad || (!is_absent(truncate) && !moec_json_bool(truncate, &r->truncate)))
        return moec_fail(err, MOEC_EFORMAT, "config.json: rope: %s is %s", in.bad ? in.bad : "truncate",
                         in.bad ? "not a number" : "neither true nor false");
    if (!(r->theta > 1.0 && r->theta < 1e30 && r->factor > 0.0 && r->factor < 1e9 && r->original > 0.0 &&
          partial > 0.0 && partial <= 1.0 && r->max_positions > 0 && r->high_factor > r->low_factor &&
          r->low_factor > 0.0 && r->beta_fast > 0.0 && r->beta_slow > 0.0))
        return moec_fail(err, MOEC_EFORMAT, "config.json: rope: a number is out of range (theta %g, factor %g, original %g, "
                         "partial %g)", r->theta, r->factor, r->original, partial);
    r->width = (int64_t)((double)width * partial);
    if (r->width < 2 || r->width % 2 != 0)
        return moec_fail(err, MOEC_EFORMAT, "config.json: rope: rotated width %lld is not even", (long long)r->width);
    return MOEC_OK;
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

void moec_rope_table(double *inv_freq, double *scale, const moec_rope *r, int64_t length)
{
    double theta = r->theta, w = (double)r->width;
    if (r->kind == MOEC_ROPE_DYNAMIC && length > r->max_positions && r->width > 2) /* NTK-aware, by length */
        theta *= pow(r->factor * (double)length / (double)r->max_positions - (r->factor - 1.0), w / (w - 2.0));
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
}
