/* A plan file from anywhere: reading ends in a plan or in a code with a text; what was read is whole (indices ascend and lie
 * in range) and is the same plan when it is written and read again. */
#include "base/mem.h"
#include "method/plan.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(bool holds)
{
    if (!holds)
        abort();
}

static void check_list(const int32_t *list, int64_t n, int64_t experts)
{
    for (int64_t i = 0; i < n; i++)
        check(list[i] >= 0 && list[i] < experts && (i == 0 || list[i] > list[i - 1]));
}

static void check_plan(const moec_plan *p)
{
    check(p->n_layers >= 1 && p->top_k >= 1 && p->new_top_k >= 1 && p->new_top_k <= p->top_k);
    for (int64_t l = 0; l < p->n_sets; l++) {
        const moec_plan_layer *pl = &p->layer[l];
        check(pl->n_keep >= 1 && pl->n_keep <= pl->n_experts);
        check((pl->kind == MOEC_SET_MOE) == (l < p->n_layers));
        check(l == 0 || pl->kind > pl[-1].kind || (pl->kind == pl[-1].kind && pl->layer > pl[-1].layer));
        check_list(pl->keep, pl->n_keep, pl->n_experts);
        check_list(pl->unseen, pl->n_unseen, pl->n_experts);
        check_list(pl->guarded, pl->n_guarded, pl->n_experts);
        for (int64_t k = 0; k < pl->n_keep; k++)
            check(moec_plan_kept(p, l, pl->keep[k]) == k);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    moec_plan *p, *again;
    moec_err err = {MOEC_OK, ""};
    moec_status st = moec_plan_parse(&p, (const char *)data, size, "input", &err);
    if (st != MOEC_OK) {
        check(st == MOEC_EFORMAT && err.code == st && err.text[0] != '\0' && !p);
        return 0;
    }
    check_plan(p);
    char *text, *second;
    check(moec_plan_to_text(&text, p, &err) == MOEC_OK);
    check(moec_plan_parse(&again, text, strlen(text), "again", &err) == MOEC_OK);
    check(moec_plan_to_text(&second, again, &err) == MOEC_OK);
    check(strcmp(text, second) == 0);
    moec_free(second);
    moec_free(text);
    moec_plan_free(again);
    moec_plan_free(p);
    return 0;
}
