/* How much is kept of each matrix: forms, plans and their text; see factor.h. */
#include "method/factor_plan.h"

#include "base/mem.h"
#include "method/factor.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static const char *const names[MOEC_FACTOR_KINDS] = {"", "svd", "mc-smoe", "base-delta", "mpo", "pivot"};

const char *moec_factor_name(moec_factor_kind kind)
{
    return names[kind];
}

/* --- forms ----------------------------------------------------------------------------------------------------------- */

static int64_t smallest_factor(int64_t n)
{
    for (int64_t d = 2; d * d <= n; d++)
        if (n % d == 0)
            return d;
    return n;
}

void moec_factor_split(int64_t *out, int64_t n, int64_t number)
{
    int64_t part[MOEC_FACTOR_CORES], prime[64];
    int primes = 0;
    for (; number > 1 && primes < 64; number /= prime[primes - 1])
        prime[primes++] = smallest_factor(number);
    for (int64_t k = 0; k < n; k++)
        part[k] = 1;
    while (primes > 0) { /* the largest that is left to the smallest product */
        int64_t least = 0;
        for (int64_t k = 1; k < n; k++)
            least = part[k] < part[least] ? k : least;
        part[least] *= prime[--primes];
    }
    for (int64_t k = 1; k < n; k++) /* ascending */
        for (int64_t j = k; j > 0 && part[j] < part[j - 1]; j--) {
            const int64_t t = part[j];
            part[j] = part[j - 1];
            part[j - 1] = t;
        }
    for (int64_t k = 0; k < n; k++) /* from the ends inwards, left and right in turn */
        out[k % 2 == 0 ? k / 2 : n - 1 - k / 2] = part[k];
}

moec_factor_shape moec_factor_shape_of(const moec_plan_factor *f, const moec_model *m, bool down)
{
    const int64_t H = m->dims.hidden, I = m->dims.expert_width;
    moec_factor_shape s = {.kind = f->kind, .rows = down ? H : I, .cols = down ? I : H, .rank = f->rank[down],
                           .keep = f->rows[down], .cores = f->cores};
    if (f->kind != MOEC_FACTOR_MPO)
        return s;
    moec_factor_split(s.out, s.cores, s.rows);
    moec_factor_split(s.in, s.cores, s.cols);
    s.bond[0] = s.bond[s.cores] = 1;
    for (int64_t k = 1; k < s.cores; k++)
        s.bond[k] = f->bond[down][k - 1];
    return s;
}

int moec_factor_pieces(moec_factor_piece out[MOEC_FACTOR_PIECES], const moec_factor_shape *s)
{
    static const char *const core[MOEC_FACTOR_CORES] = {"", "_core2", "_core3", "_core4", "_core5"};
    int n = 0;
    for (int64_t k = 0; s->kind == MOEC_FACTOR_MPO && k < s->cores; k++)
        out[n++] = (moec_factor_piece){core[k], false, false, 4, {s->bond[k], s->out[k], s->in[k], s->bond[k + 1]}};
    if (s->kind == MOEC_FACTOR_MPO)
        return n;
    out[n++] = (moec_factor_piece){"", false, false, 2, {s->kind == MOEC_FACTOR_PIVOT ? s->rows - s->rank : s->rows, s->rank}};
    out[n++] = (moec_factor_piece){"_in", false, false, 2, {s->rank, s->cols}};
    if (s->kind == MOEC_FACTOR_PIVOT)
        out[n++] = (moec_factor_piece){"_index", false, true, 1, {s->rows}};
    if (s->kind == MOEC_FACTOR_BASE)
        out[n++] = (moec_factor_piece){"_base", true, false, 2, {s->rows, s->cols}};
    if (s->kind == MOEC_FACTOR_ROWS && s->keep > 0) {
        out[n++] = (moec_factor_piece){"_rows", false, false, 2, {s->keep, s->cols}};
        out[n++] = (moec_factor_piece){"_index", false, true, 1, {s->keep}};
    }
    return n;
}

int64_t moec_factor_piece_values(const moec_factor_piece *p)
{
    int64_t n = 1;
    for (int k = 0; k < p->rank; k++)
        n *= p->dim[k];
    return n;
}

uint64_t moec_factor_bytes(const moec_factor_shape *s, int64_t experts, int64_t size)
{
    moec_factor_piece piece[MOEC_FACTOR_PIECES];
    uint64_t bytes = 0;
    const int n = moec_factor_pieces(piece, s);
    for (int k = 0; k < n; k++)
        bytes += (uint64_t)moec_factor_piece_values(&piece[k]) * (uint64_t)(piece[k].shared ? 1 : experts) *
                 (uint64_t)(piece[k].index ? 4 : size);
    return bytes;
}

/* Of the experts' values in the output; 0: quantized. */
static int64_t value_bytes(const moec_model *m, moec_dtype dtype)
{
    const moec_weight *w = &moec_set_layer(m, 0)->expert[0].gate;
    if (dtype != MOEC_DTYPE_COUNT)
        return moec_dtypes[dtype].bytes;
    return w->storage == MOEC_PLAIN ? moec_dtypes[w->of->dtype].bytes : 0;
}

void moec_factor_sizes(uint64_t *factors, uint64_t *dense, const moec_plan *p, const moec_model *m)
{
    const int64_t size = value_bytes(m, p->dtype), experts = m->dims.experts;
    const moec_factor_shape in = moec_factor_shape_of(&p->factor, m, false), down = moec_factor_shape_of(&p->factor, m, true);
    const uint64_t layers = (uint64_t)m->moe_layers;
    *factors = layers * (2 * moec_factor_bytes(&in, experts, size) + moec_factor_bytes(&down, experts, size));
    *dense = layers * 3 * (uint64_t)(experts * in.rows * in.cols * size);
}

/* --- what is asked --------------------------------------------------------------------------------------------------- */

/* The size between tensors k-1 and k of a train above which nothing is lost. */
static int64_t full_bond(const moec_factor_shape *s, int64_t k)
{
    int64_t left = 1;
    for (int64_t i = 0; i < k; i++)
        left *= s->out[i] * s->in[i];
    const int64_t right = s->rows * s->cols / left;
    return left < right ? left : right;
}

/* Each size `share` of its full one, one at least and `most` (0: any) at most. */
static void bonds(moec_factor_shape *s, double share, int64_t most)
{
    for (int64_t k = 1; k < s->cores; k++) {
        int64_t d = (int64_t)floor(share * (double)full_bond(s, k) + 1e-9);
        d = most > 0 && d > most ? most : d;
        s->bond[k] = d < 1 ? 1 : d;
    }
}

static moec_status fit_train(moec_factor_shape *s, const moec_request *q, uint64_t budget, int64_t size, moec_err *err)
{
    enum { STEPS = 1 << 16 };
    int lo = 0, hi = STEPS;
    moec_factor_split(s->out, s->cores, s->rows);
    moec_factor_split(s->in, s->cores, s->cols);
    s->bond[0] = s->bond[s->cores] = 1;
    if (q->rank > 0) {
        bonds(s, 1.0, q->rank);
        return MOEC_OK;
    }
    while (lo < hi) { /* the largest that the budget holds */
        const int mid = lo + (hi - lo + 1) / 2;
        bonds(s, (double)mid / STEPS, 0);
        if (moec_factor_bytes(s, 1, size) <= budget)
            lo = mid;
        else
            hi = mid - 1;
    }
    bonds(s, (double)lo / STEPS, 0);
    for (int64_t k = 1; k < s->cores; k++) /* what rounding left */
        while (s->bond[k] < full_bond(s, k) && moec_factor_bytes(s, 1, size) <= budget) {
            s->bond[k]++;
            if (moec_factor_bytes(s, 1, size) > budget || s->bond[k] > s->bond[k - 1] * s->out[k - 1] * s->in[k - 1]) {
                s->bond[k]--;
                break;
            }
        }
    if (moec_factor_bytes(s, 1, size) > budget)
        return moec_fail(err, MOEC_EINVAL, "--ratio %g%%: not even trains with bonds of 1 are that small; a larger ratio, or fewer "
                         "--cores", 100.0 * q->ratio);
    return MOEC_OK;
}

/* Rank, rows and bonds of one form of matrix. */
static moec_status fit(moec_factor_shape *s, const moec_request *q, int64_t size, moec_err *err)
{
    const int64_t experts = q->model->dims.experts, all = s->rows * s->cols;
    const uint64_t dense = (uint64_t)(experts * all * size);
    moec_status st = MOEC_OK;
    if (s->kind == MOEC_FACTOR_MPO) {
        st = fit_train(s, q, q->rank > 0 ? 0 : (uint64_t)floor(q->ratio * (double)(all * size) + 1e-9), size, err);
    } else {
        if (s->kind == MOEC_FACTOR_ROWS)
            s->keep = (int64_t)floor(q->keep_rows * (double)s->rows + 1e-9);
        s->rank = 0;
        const double fixed = (double)moec_factor_bytes(s, experts, size); /* what does not grow with the rank */
        const double each = (double)(experts * size * (s->rows + s->cols));
        s->rank = q->rank > 0 ? q->rank : (int64_t)floor((q->ratio * (double)dense - fixed) / each + 1e-9);
        while (s->kind == MOEC_FACTOR_PIVOT && q->rank == 0 && s->rank + 1 < s->rows && s->rank + 1 < s->cols) {
            s->rank++; /* what the r^2 values pay for */
            if ((double)moec_factor_bytes(s, experts, size) > q->ratio * (double)dense) {
                s->rank--;
                break;
            }
        }
        if (s->rank < 1)
            return moec_fail(err, MOEC_EINVAL, "--ratio %g%% leaves no rank for matrices [%lld, %lld]%s: %.3g%% is the least",
                             100.0 * q->ratio, (long long)s->rows, (long long)s->cols,
                             s->kind == MOEC_FACTOR_ROWS ? " beside the kept rows" :
                             s->kind == MOEC_FACTOR_BASE ? " beside the base" : "", 100.0 * (fixed + each) / (double)dense + 0.005);
    }
    if (st == MOEC_OK && (moec_factor_bytes(s, experts, size) >= dense || s->rank >= s->rows || s->rank >= s->cols))
        return moec_fail(err, MOEC_EINVAL, "the factors of matrices [%lld, %lld] would be as large as they are: a smaller --rank "
                         "or --ratio", (long long)s->rows, (long long)s->cols);
    return st;
}

/* Kinds whose experts are not all plain networks. */
static moec_status check_model(const moec_model *m, moec_err *err)
{
    if (m->family->n_tail > 0)
        return moec_fail(err, MOEC_EINVAL, "%s has experts without a network; they cannot be factored", m->family->model_type);
    return MOEC_OK;
}

static moec_status plan_factors(moec_plan **out, const moec_method *me, const moec_request *q, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_plan *p = NULL;
    const moec_model *m = q->model;
    const int64_t size = value_bytes(m, q->dtype);
    *out = NULL;
    MOEC_TRY(check_model(m, err));
    if (size == 0)
        MOEC_TRY(moec_fail(err, MOEC_EINVAL, "the experts are quantized and factors are not; --dtype bf16 says what to write"));
    if (q->kept)
        MOEC_TRY(moec_within(err, moec_factor_can_keep(m, err), "--emit factored"));
    if (q->rank == 0 && !(q->ratio > 0.0 && q->ratio <= 1.0))
        MOEC_TRY(moec_fail(err, MOEC_EINVAL, "--ratio %g: expected more than 0%%, up to 100%%", q->ratio));
    MOEC_TRY(moec_plan_new(&p, m, me->name, q->fingerprint, err));
    MOEC_TRY(moec_plan_keep_all(p, err));
    p->dtype = q->dtype;
    p->factor = (moec_plan_factor){.kind = *(const moec_factor_kind *)me->row, .kept = q->kept};
    p->factor.cores = p->factor.kind == MOEC_FACTOR_MPO ? q->cores : 0;
    for (int down = 0; down < 2; down++) {
        moec_factor_shape s = {.kind = p->factor.kind, .rows = down ? m->dims.hidden : m->dims.expert_width,
                               .cols = down ? m->dims.expert_width : m->dims.hidden, .cores = p->factor.cores};
        MOEC_TRY(fit(&s, q, size, err));
        p->factor.rank[down] = s.rank;
        p->factor.rows[down] = s.keep;
        for (int64_t k = 1; k < s.cores; k++)
            p->factor.bond[down][k - 1] = s.bond[k];
    }
    if (q->rank == 0)
        MOEC_TRY(moec_plan_set_option(p, "ratio", moec_json_new_real(q->ratio), err));
    for (int64_t i = 0; i < p->n_layers; i++)
        p->layer[i].rewritten = MOEC_PART_GATE | MOEC_PART_UP | MOEC_PART_DOWN;
    *out = p;
    p = NULL;
done:
    moec_plan_free(p);
    return st;
}

/* Neurons cut away to the same bytes, so that the ways can be compared: a plan of prune. */
static moec_status plan_width(moec_plan **out, const moec_method *me, const moec_request *q, moec_err *err)
{
    moec_request neurons = *q;
    moec_status st = MOEC_OK;
    (void)me;
    *out = NULL;
    neurons.grain = MOEC_GRAIN_NEURONS;
    neurons.share = 1.0 - q->ratio;
    MOEC_TRY(moec_method_plan(out, MOEC_PRUNE, NULL, &neurons, err));
    (*out)->dtype = q->dtype;
done:
    return st;
}

/* --- does it fit ----------------------------------------------------------------------------------------------------- */

const char *moec_factor_refused(const moec_model *m)
{
    const moec_layer *l = moec_set_layer(m, 0);
    const char *why = NULL;
    if (!m->family->loads_transformers || m->family->remote_code)
        why = "transformers has no class of its own for the family";
    else if (m->config_at[0] || strcmp(m->prefix, "model.") != 0)
        why = "the text model is a part of another one";
    else if (m->family->weight_on_input || (l->layout != MOEC_LAYOUT_SPLIT && l->layout != MOEC_LAYOUT_OUT_IN))
        why = "its experts are no module of transformers whose matrices stand as [out, in]";
    else if (l->gate_up_bias || l->down_bias)
        why = "its experts have biases";
    else if (!strstr(l->expert[0].gate.of->name, ".experts."))
        why = "its experts' tensors are not called experts";
    return why;
}

moec_status moec_factor_can_keep(const moec_model *m, moec_err *err)
{
    const char *why = moec_factor_refused(m);
    return why ? moec_fail(err, MOEC_EINVAL, "%s: %s; --emit dense works with every client", m->family->model_type, why) : MOEC_OK;
}

static bool possible(const moec_factor_shape *s)
{
    int64_t left = 1;
    if (s->kind != MOEC_FACTOR_MPO)
        return s->rank >= 1 && s->rank < s->rows && s->rank < s->cols && s->keep >= 0 && s->keep <= s->rows &&
               (s->kind == MOEC_FACTOR_ROWS || s->keep == 0);
    for (int64_t k = 1; k < s->cores; k++) {
        left *= s->out[k - 1] * s->in[k - 1];
        const int64_t right = s->rows * s->cols / left;
        if (s->bond[k] < 1 || s->bond[k] > left || s->bond[k] > right || s->bond[k] > s->bond[k - 1] * s->out[k - 1] * s->in[k - 1])
            return false;
    }
    return true;
}

moec_status moec_factor_check(const moec_plan *p, const moec_model *m, moec_err *err)
{
    const uint32_t all = MOEC_PART_GATE | MOEC_PART_UP | MOEC_PART_DOWN;
    moec_status st = MOEC_OK;
    if (p->factor.kind == MOEC_FACTOR_NONE)
        return MOEC_OK;
    if (check_model(m, err) != MOEC_OK || (p->factor.kept && moec_factor_can_keep(m, err) != MOEC_OK))
        return moec_fail(err, MOEC_EFORMAT, "plan: %s", err ? err->text : "factors");
    if (value_bytes(m, p->dtype) == 0)
        return moec_fail(err, MOEC_EFORMAT, "plan: factors of quantized experts need a dtype");
    for (int64_t i = 0; st == MOEC_OK && i < p->n_sets; i++) {
        const moec_plan_layer *l = &p->layer[i];
        if (l->n_keep != l->n_experts || l->rewritten != (i < p->n_layers ? all : 0))
            st = moec_fail(err, MOEC_EFORMAT, "plan: %s layer %lld: with \"factor\" every expert is kept, and of MoE layers gate, up "
                           "and down are rewritten", moec_set_name(l->kind), (long long)l->layer);
    }
    if (st == MOEC_OK && (p->width > 0 || p->pad > 0 || p->n_drop > 0 || p->repair))
        st = moec_fail(err, MOEC_EFORMAT, "plan: \"factor\" does not go with expert_width, pad, drop_layers or repair");
    for (int down = 0; st == MOEC_OK && down < 2; down++) {
        const moec_factor_shape s = moec_factor_shape_of(&p->factor, m, down == 1);
        if (!possible(&s))
            st = moec_fail(err, MOEC_EFORMAT, "plan: factor: its numbers are not possible for matrices [%lld, %lld]",
                           (long long)s.rows, (long long)s.cols);
    }
    return st;
}

/* --- text ------------------------------------------------------------------------------------------------------------ */

moec_json *moec_factor_config(const moec_plan *p, const moec_model *m)
{
    static const char *const matrix[] = {"gate_proj", "up_proj", "down_proj"};
    moec_json *o = moec_json_new_object(), *tensors = moec_json_new_object(), *shared = moec_json_new_array();
    for (int k = 0; k < 3; k++) {
        const moec_factor_shape s = moec_factor_shape_of(&p->factor, m, k == 2);
        moec_factor_piece piece[MOEC_FACTOR_PIECES];
        const int n = moec_factor_pieces(piece, &s);
        for (int i = 0; i < n; i++) {
            char name[48];
            snprintf(name, sizeof name, "%s%s", matrix[k], piece[i].suffix);
            moec_json_set(tensors, name, moec_json_new_long_ints(piece[i].dim, piece[i].rank));
            if (piece[i].shared)
                moec_json_push(shared, moec_json_new_string(name));
        }
    }
    moec_json_set(o, "method", moec_json_new_string(names[p->factor.kind]));
    moec_json_set(o, "tensors", tensors);
    moec_json_set(o, "shared", shared);
    return o;
}

moec_json *moec__factor_to_json(const moec_plan *p)
{
    const moec_plan_factor *f = &p->factor;
    moec_json *o = moec_json_new_object(), *a;
    moec_json_set(o, "kind", moec_json_new_string(names[f->kind]));
    moec_json_set(o, "emit", moec_json_new_string(f->kept ? "factored" : "dense"));
    if (f->kind == MOEC_FACTOR_MPO) {
        moec_json_set(o, "cores", moec_json_new_int(f->cores));
        a = moec_json_new_array();
        for (int down = 0; down < 2; down++)
            for (int64_t k = 0; k + 1 < f->cores; k++)
                moec_json_push(a, moec_json_new_int(f->bond[down][k]));
        moec_json_set(o, "bonds", a);
    } else {
        moec_json_set(o, "rank", moec_json_new_long_ints(f->rank, 2));
    }
    if (f->kind == MOEC_FACTOR_ROWS)
        moec_json_set(o, "rows", moec_json_new_long_ints(f->rows, 2));
    if (f->error)
        moec_json_set(o, "error", moec_json_new_reals(f->error, 3 * p->n_layers));
    return o;
}

static moec_status read_numbers(int64_t *out, int64_t n, const moec_reader *r, const moec_json *o, const char *key)
{
    const moec_json *a = moec_json_get(o, key);
    bool good = moec_json_type(a) == MOEC_JSON_ARRAY && moec_json_len(a) == (size_t)n;
    for (int64_t i = 0; good && i < n; i++)
        good = moec_json_int(moec_json_at(a, (size_t)i), &out[i]) && out[i] >= 0 && out[i] < 1 << 24;
    return good ? MOEC_OK : moec_fail(r->err, MOEC_EFORMAT, "%s: factor: %s is not a list of %lld sizes", r->what, key, (long long)n);
}

moec_status moec__factor_read(moec_plan *p, const moec_reader *r, moec_json *o)
{
    static const char *const known[] = {"kind", "emit", "rank", "rows", "cores", "bonds", "error"};
    moec_status st = MOEC_OK;
    moec_plan_factor *f = &p->factor;
    char kind[16], emit[16];
    int64_t bond[2 * (MOEC_FACTOR_CORES - 1)];
    if (!o)
        return MOEC_OK;
    MOEC_TRY(moec__read_keys(r, o, "factor", known, MOEC_COUNT(known)));
    MOEC_TRY(moec__read_text(kind, sizeof kind, r, o, "kind", true));
    MOEC_TRY(moec__read_text(emit, sizeof emit, r, o, "emit", true));
    for (f->kind = MOEC_FACTOR_SVD; f->kind < MOEC_FACTOR_KINDS && strcmp(names[f->kind], kind) != 0;)
        f->kind++;
    f->kept = strcmp(emit, "factored") == 0;
    if (f->kind == MOEC_FACTOR_KINDS || (!f->kept && strcmp(emit, "dense") != 0)) {
        f->kind = MOEC_FACTOR_NONE;
        return moec_fail(r->err, MOEC_EFORMAT, "%s: factor: kind %s or emit %s is none that is known", r->what, kind, emit);
    }
    if (f->kind == MOEC_FACTOR_MPO) {
        MOEC_TRY(moec__read_int(&f->cores, r, o, "factor", "cores", 2, MOEC_FACTOR_CORES));
        MOEC_TRY(read_numbers(bond, 2 * (f->cores - 1), r, o, "bonds"));
        for (int64_t k = 0; k < 2 * (f->cores - 1); k++)
            f->bond[k / (f->cores - 1)][k % (f->cores - 1)] = bond[k];
    } else {
        MOEC_TRY(read_numbers(f->rank, 2, r, o, "rank"));
    }
    if (f->kind == MOEC_FACTOR_ROWS)
        MOEC_TRY(read_numbers(f->rows, 2, r, o, "rows"));
    if (moec_json_get(o, "error"))
        MOEC_TRY(moec__read_reals(&f->error, 3 * p->n_layers, r, o, "factor", "error"));
done:
    return st;
}

/* --- methods --------------------------------------------------------------------------------------------------------- */

static const moec_factor_kind kind_svd = MOEC_FACTOR_SVD, kind_pivot = MOEC_FACTOR_PIVOT,
                              kind_rows = MOEC_FACTOR_ROWS, kind_base = MOEC_FACTOR_BASE,
                              kind_mpo = MOEC_FACTOR_MPO;

extern const moec_method moec_method_factor_svd, moec_method_factor_pivot,
    moec_method_factor_rows, moec_method_factor_base, moec_method_factor_mpo,
    moec_method_factor_width;

const moec_method moec_method_factor_svd = {
    .name = "svd",
    .kind = MOEC_FACTOR,
    .is_default = true,
    .brief = "each matrix by the product of two of lower rank, of least output error on the expert's own tokens",
    .paper = "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
    .arxiv = "2403.07378",
    .formula = "W' = P P^T W, P: leading eigenvectors of W E[g^2 x x^T] W^T",
    .row = &kind_svd,
    .plan = plan_factors,
};
const moec_method moec_method_factor_pivot = {
    .name = "pivot",
    .kind = MOEC_FACTOR,
    .brief = "the product of svd, kept as some of its own rows and the others' coefficients: a higher rank in the same bytes",
    .paper = "Pivoting Factorization: A Compact Meta Low-Rank Representation of Sparsity for Efficient Inference in Large Language "
             "Models",
    .arxiv = "2501.19090",
    .formula = "W' = P P^T W; r(out + in - r) values in place of r(out + in)",
    .row = &kind_pivot,
    .plan = plan_factors,
};
const moec_method moec_method_factor_rows = {
    .name = "mc-smoe",
    .kind = MOEC_FACTOR,
    .brief = "the product of svd, and whole rows of what it leaves (--keep-rows)",
    .paper = "Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy",
    .arxiv = "2310.01334",
    .formula = "W' = A B + S, S: rows o of W - A B of largest s_o E[g^2 x x^T] s_o^T",
    .row = &kind_rows,
    .plan = plan_factors,
};
const moec_method moec_method_factor_base = {
    .name = "base-delta",
    .kind = MOEC_FACTOR,
    .brief = "one base for all experts of a layer, and what each differs from it by svd",
    .paper = "Delta Decompression for MoE-based LLMs Compression",
    .arxiv = "2502.17298",
    .formula = "W_e' = M + svd(W_e - M), M = sum_e m_e W_e / sum_e m_e, m_e = sum_t g_t^2",
    .row = &kind_base,
    .plan = plan_factors,
};
const moec_method moec_method_factor_mpo = {
    .name = "mpo",
    .kind = MOEC_FACTOR,
    .brief = "each matrix by a tensor train (--cores); it sees no tokens",
    .paper = "Parameter-Efficient Mixture-of-Experts Architecture for Pre-trained Language Models",
    .arxiv = "2203.01104",
    .formula = "W' = T_1 T_2 .. T_n by truncated singular value decompositions",
    .row = &kind_mpo,
    .plan = plan_factors,
};
const moec_method moec_method_factor_width = {
    .name = "width",
    .kind = MOEC_FACTOR,
    .brief = "no factors but fewer neurons of every expert, to the same bytes: for comparison, loads everywhere",
    .paper = "prune --grain neurons",
    .formula = "the neurons of largest sum_t g_t^2 a_j^2 / n_e |d_j|^2 stay",
    .plan = plan_width,
};
