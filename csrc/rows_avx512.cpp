// The row kernels for this instruction set; setup.py gives the flags.
#define KEPO_ISA kepo_avx512
#define KEPO_LANES 16
#include "row_kernels.h"
