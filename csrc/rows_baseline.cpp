// The row kernels for this instruction set; setup.py gives the flags.
#define KEPO_ISA kepo_baseline
#define KEPO_LANES 4
#include "row_kernels.h"
