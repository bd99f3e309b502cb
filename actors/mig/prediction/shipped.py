"""The prior that ships with the predictor: nine means and spreads, learned from published measurements.

From the 20 workloads (11 families) of MLSysOps/MIGProfiler, MunQ-Lee/ParvaGPU_SC24 and boringlee24/socc22-miso (all
MIT; A100-40GB and A100-80GB) that lie in shared/data/mig, by ``prior.learn(..., WEAK)``; a test learns them again. No
figure about those workloads may be made with this prior, which has seen them: benchmarks.migperf_model learns one
without the tested family for each fold.
"""

from __future__ import annotations

import dataclasses

from actors.mig.prediction.fit import Population
from actors.mig.prediction.prior import WEAK

SHIPPED_FAMILIES = 11

POPULATION: Population = dataclasses.replace(
    WEAK,
    #     log_slope, log_f0, log_host, log_b0, scaling, memory, log_q, sequence, span  (law.NAMES)
    mean=(0.0, 0.657, -2.21, 0.262, 0.986, 0.340, 1.631, 1.134, 0.0499),
    sd=(3.0, 1.159, 1.88, 1.70, 0.0556, 0.1177, 0.788, 0.1726, 0.0331),
)
