// Nothing: no kernel of CUTLASS's is launched here.
#pragma once
