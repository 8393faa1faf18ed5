// The row kernels for this instruction set; setup.py gives the flags.
#define KEPO_ISA kepo_avx2
#define KEPO_LANES 8
#include "row_kernels.h"
