/* Frozen weights of any length, to fill the flash of a machine: DEMO_BALLAST floats. */
#ifndef DEMO_BALLAST
#define DEMO_BALLAST 4
#endif

extern const float demo_ballast[DEMO_BALLAST];
const float demo_ballast[DEMO_BALLAST] = {[DEMO_BALLAST - 1] = 0.25f};
