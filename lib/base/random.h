/* Pseudorandom numbers that any machine draws alike. */
#ifndef MOEC_BASE_RANDOM_H
#define MOEC_BASE_RANDOM_H

#include <stdint.h>

/** splitmix64's value for state x; the state of the next one is x + 0x9e3779b97f4a7c15.
 *  Source: Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators (OOPSLA 2014). */
static inline uint64_t moec_mix64(uint64_t x)
{
    x += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

#endif
