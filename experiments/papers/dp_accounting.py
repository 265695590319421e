"""The privacy that 10,000 steps of DP-SGD spend, as the paper that introduced its accountant says.

Question   does the accountant give the published epsilon?
Command    gptjax repro dp_accounting
Cost       seconds; nothing is trained. Needs pip install 'gptjax[private]'
Expected   1.26 by the moments accountant; the tightest bound known today is lower
Source     Abadi et al. 2016, "Deep Learning with Differential Privacy", section 3.2, the example of figure 2
"""

from pathlib import Path

from gptjax.lab.repro import Claim, Measurement
from gptjax.training.privacy import spent

SETTING = dict(sampling_rate=0.01, noise_multiplier=4.0, steps=10_000, delta=1e-5)
PUBLISHED, TOLERANCE = 1.26, 0.01


def measure(folder: Path) -> Measurement:
    found = spent(**SETTING)
    return Measurement(
        ours=f"epsilon {found.moments:.4f}",
        passed=abs(found.moments / PUBLISHED - 1) <= TOLERANCE,
        metrics=SETTING | found._asdict(),
        note=f"Accounted by the whole distribution of the privacy loss, the same run spends only {found.epsilon:.4f}.",
    )


claim = Claim(
    title="The moments accountant gives epsilon 1.26 after 10,000 steps at sampling rate 0.01 and noise 4",
    citation="Abadi et al. 2016, Deep Learning with Differential Privacy (CCS), section 3.2, figure 2",
    published="epsilon 1.26 at delta 1e-5",
    tolerance=f"within {TOLERANCE:.0%}",
    minutes=0.2,
    measure=measure,
)
