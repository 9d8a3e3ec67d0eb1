/* The table of families. */
#include "model/family.h"

#include <string.h>

#define MOEC_FAMILY(id) extern const moec_family moec_family_##id;
#include "model/family_table.inc"
#undef MOEC_FAMILY

#define MOEC_FAMILY(id) &moec_family_##id,
static const moec_family *const families[] = {
#include "model/family_table.inc"
};
#undef MOEC_FAMILY

const moec_family *moec_family_at(int i)
{
    return i >= 0 && (size_t)i < MOEC_COUNT(families) ? families[i] : NULL;
}

const moec_family *moec_family_find(const char *model_type)
{
    for (size_t i = 0; i < MOEC_COUNT(families); i++)
        if (strcmp(families[i]->model_type, model_type) == 0)
            return families[i];
    return NULL;
}
