// Nothing: what it is about is not used, and needs nvcc.
#pragma once
