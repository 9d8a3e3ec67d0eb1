/* A pattern store from anywhere: reading ends in a store or in a code with a text; every ranking that was read is a
 * permutation in the order of its scores, and the store is the same when it is written and read again. */
#include "base/mem.h"
#include "method/patterns.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(bool holds)
{
    if (!holds)
        abort();
}

static void check_task(const moec_patterns *p, const moec_task *t)
{
    check(t->tokens > 0 && t->name[0]);
    for (int64_t i = 0; i < p->layers * p->experts; i++) {
        const double *score = t->score + i / p->experts * p->experts;
        check(isfinite(t->score[i]) && t->ranking[i] >= 0 && t->ranking[i] < p->experts);
        if (i % p->experts == 0)
            continue;
        const int32_t a = t->ranking[i - 1], b = t->ranking[i];
        check(score[a] > score[b] || (score[a] == score[b] && a < b));
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    moec_patterns *p, *again;
    moec_err err = {MOEC_OK, ""};
    moec_status st = moec_patterns_parse(&p, (const char *)data, size, "input", &err);
    if (st != MOEC_OK) {
        check(st == MOEC_EFORMAT && err.code == st && err.text[0] != '\0' && !p);
        return 0;
    }
    check(p->n_tasks > 0);
    for (int i = 0; i < p->n_tasks; i++)
        check_task(p, &p->task[i]);
    char *text, *second;
    check(moec_patterns_to_text(&text, p, &err) == MOEC_OK);
    check(moec_patterns_parse(&again, text, strlen(text), "again", &err) == MOEC_OK);
    check(moec_patterns_to_text(&second, again, &err) == MOEC_OK);
    check(strcmp(text, second) == 0);
    moec_free(second);
    moec_free(text);
    moec_patterns_free(again);
    moec_patterns_free(p);
    return 0;
}
