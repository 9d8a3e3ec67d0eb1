/* PCRE2 behind our own names: compiled with JIT where the machine allows it, bounded in steps and memory. */
#define PCRE2_CODE_UNIT_WIDTH 8

#include "text/pattern.h"

#include "base/mem.h"
#include "text/onig.h"
#include "text/utf8.h"

#include <pcre2.h>
#include <string.h>

enum {
    MATCH_STEPS = 50 * 1000 * 1000, /* at one starting place; some tenths of a second */
    HEAP_KIB = 256 * 1024,
    JIT_STACK_LOW = 32 * 1024,
    JIT_STACK_HIGH = 32 * 1024 * 1024
};

struct moec__pattern {
    pcre2_code *code; /* NULL: a literal */
    bool jit;
    char *literal;
    size_t n;
};

struct moec__matcher {
    pcre2_match_context *context;
    pcre2_match_data *data; /* room for the whole match only; groups are not asked for */
    pcre2_jit_stack *stack;
};

static void *grab(size_t n, void *unused)
{
    void *p;
    (void)unused;
    return moec_alloc(&p, n, 1, NULL) == MOEC_OK ? p : NULL;
}

static void give(void *p, void *unused)
{
    (void)unused;
    moec_free(p);
}

static moec_status compile(pcre2_code **out, const char *text, size_t n, moec_err *err)
{
    moec_status st = MOEC_OK;
    int code = 0;
    PCRE2_SIZE at = 0;
    pcre2_compile_context *context = NULL;
    pcre2_general_context *general = pcre2_general_context_create(grab, give, NULL);
    if (general)
        context = pcre2_compile_context_create(general);
    if (!context) {
        st = moec_fail(err, MOEC_ENOMEM, "out of memory: no room for a regular expression");
        goto done;
    }
    pcre2_set_newline(context, PCRE2_NEWLINE_LF); /* as Oniguruma: $ and . know only \n */
    pcre2_set_max_pattern_length(context, 1 << 20);
    pcre2_set_parens_nest_limit(context, 100);
    *out = pcre2_compile((PCRE2_SPTR)text, n, PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C,
                         &code, &at, context);
    if (!*out) {
        PCRE2_UCHAR reason[160] = "";
        (void)pcre2_get_error_message(code, reason, sizeof reason);
        st = moec_fail(err,
                       code == PCRE2_ERROR_NOMEMORY || code == PCRE2_ERROR_HEAP_FAILED ? MOEC_ENOMEM : MOEC_EFORMAT,
                       "regular expression: %s (byte %zu as rewritten for PCRE2)", (const char *)reason, (size_t)at);
    }
done:
    pcre2_compile_context_free(context);
    pcre2_general_context_free(general);
    return st;
}

moec_status moec__pattern_regex(moec__pattern **out, const char *onig, size_t n, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec__buf text = {0};
    moec__pattern *p = NULL;
    *out = NULL;
    MOEC_TRY(moec__onig_to_pcre(&text, onig, n, err));
    MOEC_TRY(MOEC_NEW(p, 1, err));
    MOEC_TRY(compile(&p->code, text.p, text.n, err));
    /* Without JIT (no memory that may be executed, or another processor) matching is slower, not different. */
    p->jit = pcre2_jit_compile(p->code, PCRE2_JIT_COMPLETE) == 0;
    *out = p;
    p = NULL;
done:
    moec__pattern_free(p);
    moec_free(text.p);
    return st;
}

moec_status moec__pattern_literal(moec__pattern **out, const char *bytes, size_t n, moec_err *err)
{
    moec_status st = MOEC_NEW(*out, 1, err);
    if (st != MOEC_OK)
        return st;
    (*out)->n = n;
    st = moec_copy(&(*out)->literal, bytes, n, err);
    if (st != MOEC_OK) {
        moec__pattern_free(*out);
        *out = NULL;
    }
    return st;
}

void moec__pattern_free(moec__pattern *p)
{
    if (!p)
        return;
    pcre2_code_free(p->code);
    moec_free(p->literal);
    moec_free(p);
}

moec_status moec__matcher_new(moec__matcher **out, moec_err *err)
{
    moec__matcher *m;
    moec_status st = MOEC_NEW(m, 1, err);
    *out = NULL;
    if (st != MOEC_OK)
        return st;
    pcre2_general_context *general = pcre2_general_context_create(grab, give, NULL);
    if (general) {
        m->context = pcre2_match_context_create(general);
        m->data = pcre2_match_data_create(1, general);
        m->stack = pcre2_jit_stack_create(JIT_STACK_LOW, JIT_STACK_HIGH, general);
        pcre2_general_context_free(general);
    }
    if (!m->context || !m->data) { /* a missing JIT stack only means the small built-in one */
        moec__matcher_free(m);
        return moec_fail(err, MOEC_ENOMEM, "out of memory: no room to match a regular expression");
    }
    if (m->stack)
        pcre2_jit_stack_assign(m->context, NULL, m->stack);
    pcre2_set_match_limit(m->context, MATCH_STEPS);
    pcre2_set_heap_limit(m->context, HEAP_KIB);
    *out = m;
    return MOEC_OK;
}

void moec__matcher_free(moec__matcher *m)
{
    if (!m)
        return;
    pcre2_jit_stack_free(m->stack);
    pcre2_match_data_free(m->data);
    pcre2_match_context_free(m->context);
    moec_free(m);
}

static bool find_literal(size_t *from, size_t *to, const moec__search *q)
{
    const char *hit = q->s + q->at;
    if (q->p->n == 1)
        hit = memchr(q->s + q->at, (unsigned char)q->p->literal[0], q->n - q->at);
    else if (q->p->n > 1)
        hit = memmem(q->s + q->at, q->n - q->at, q->p->literal, q->p->n);
    if (!hit)
        return false;
    *from = (size_t)(hit - q->s);
    *to = *from + q->p->n;
    return true;
}

static moec_status find_regex(bool *found, size_t *from, size_t *to, const moec__search *q, moec_err *err)
{
    int rc = PCRE2_ERROR_JIT_STACKLIMIT;
    if (q->p->jit)
        rc = pcre2_jit_match(q->p->code, (PCRE2_SPTR)q->s, q->n, q->at, 0, q->m->data, q->m->context);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT)
        rc = pcre2_match(q->p->code, (PCRE2_SPTR)q->s, q->n, q->at, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, q->m->data,
                         q->m->context);
    *found = rc >= 0;
    if (rc >= 0) {
        const PCRE2_SIZE *range = pcre2_get_ovector_pointer(q->m->data);
        *from = range[0];
        *to = range[1];
        return MOEC_OK;
    }
    if (rc == PCRE2_ERROR_NOMATCH)
        return MOEC_OK;
    if (rc == PCRE2_ERROR_NOMEMORY)
        return moec_fail(err, MOEC_ENOMEM, "out of memory while matching a regular expression");
    PCRE2_UCHAR reason[160] = "";
    (void)pcre2_get_error_message(rc, reason, sizeof reason);
    return moec_fail(err, MOEC_EFORMAT,
                     "a regular expression of the tokenizer cannot be matched at byte %zu of a piece of text: %s",
                     q->at, (const char *)reason);
}

moec_status moec__search_next(bool *found, size_t *from, size_t *to, moec__search *q, moec_err *err)
{
    *found = false;
    while (q->at <= q->n) {
        if (q->p->code) {
            moec_status st = find_regex(found, from, to, q, err);
            if (st != MOEC_OK)
                return st;
        } else {
            *found = find_literal(from, to, q);
        }
        if (!*found)
            break;
        if (*from == *to && q->any && q->last == *to) {
            q->at += q->at < q->n ? moec__utf8_len((unsigned char)q->s[q->at]) : 1;
            *found = false;
            continue;
        }
        /* \K and lookbehind tricks may give ranges that do not advance; they must not loop or run backwards. */
        if (*to < *from || *from < q->at)
            return moec_fail(err, MOEC_EFORMAT, "a regular expression of the tokenizer matches backwards");
        q->at = q->last = *to;
        q->any = true;
        return MOEC_OK;
    }
    q->at = q->n + 1;
    return MOEC_OK;
}
