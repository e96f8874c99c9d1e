"""Easy-to-hard curriculum: reference, property, parallel, resume."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_modules import curriculum_diffusion as curriculum
from lightning_modules.curriculum_diffusion import CurriculumTimes
from lightning_modules.diffusion.processes import EDM, DDPMCosine, DDPMLinear, LinearFlow, Process
from lightning_modules.diffusion.times import edm_quantiles

GOLDEN = np.load(Path(__file__).parent / "golden" / "curriculum_diffusion.npz")
"""Pacing and uniform clusters: transcription of the algorithm; SNR clusters: gohyojun15/ANT_diffusion."""


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# 1. reference


def test_uniform_clusters_equal_the_reference() -> None:
    assert torch.equal(curriculum.uniform_clusters(*GOLDEN["uniform_TN"].tolist()), golden("uniform_clusters"))


def test_pacing_equals_the_reference_at_every_step() -> None:
    state, num = curriculum.start_of_pacing(), int(GOLDEN["pace_N"])
    edges = torch.arange(num + 1) * 50
    for step, loss in enumerate(golden("pace_losses")):
        low, _ = curriculum.active_range(edges, state.stage, "e2h")
        assert (int(state.stage), int(low)) == (GOLDEN["pace_stage"][step], GOLDEN["pace_tmin"][step]), step
        state = curriculum.pace(state, loss, num, int(GOLDEN["pace_tau"]))
        assert (int(state.patience), float(state.best)) == (GOLDEN["pace_patience"][step], GOLDEN["pace_best"][step])


def test_sampler_follows_the_reference_pacing() -> None:
    sampler, process = CurriculumTimes(tau=int(GOLDEN["pace_tau"])), DDPMLinear()
    for step, loss in enumerate(golden("pace_losses")):
        assert int(sampler.stage) == GOLDEN["pace_stage"][step]
        sampler.observe(process, torch.zeros(4, dtype=torch.int64), loss + torch.tensor([-0.2, 0.2, 0.1, -0.1]))
        sampler.step(step + 1)
    assert sampler.stage_steps.tolist() == np.bincount(GOLDEN["pace_stage"], minlength=22)[1:].tolist()


def test_edm_quantiles_equal_the_reference() -> None:
    ours = edm_quantiles(EDM(p_mean=float(GOLDEN["edm_pmean"]), p_std=float(GOLDEN["edm_pstd"])), int(GOLDEN["edm_N"]))
    torch.testing.assert_close(ours, golden("edm_sigma_edges"), rtol=1e-10, atol=0.0)


@pytest.mark.parametrize(("curve", "name"), [("log", "snr_clusters_logsnr"), ("abar", "snr_abar_clusters")])
def test_snr_clusters_equal_the_official_ones(curve: str, name: str) -> None:
    process = DDPMCosine(int(GOLDEN["snr_T"]))
    values = process.alphas_cumprod if curve == "abar" else process.log_snr(torch.arange(process.timesteps))
    expected = golden(name).long()
    expected[-1, 1] = process.timesteps - 1  # the official code prints 1000, whatever T
    assert torch.equal(curriculum.snr_clusters(values, int(GOLDEN["snr_k"])), expected)


# 2. property


def drawn(sampler: CurriculumTimes, process: Process, stage: int, count: int = 4000) -> Tensor:
    sampler.stage.fill_(stage)
    return sampler(count, process, generator()).time


@pytest.mark.parametrize(
    ("order", "stage", "low", "high"),
    [
        ("e2h", 1, 950, 999),
        ("e2h", 5, 750, 999),
        ("e2h", 20, 0, 999),
        ("e2h", 21, 0, 999),
        ("h2e", 1, 0, 49),
        ("h2e", 5, 0, 249),
        ("naive", 1, 950, 999),
        ("naive", 5, 750, 799),
        ("naive", 21, 0, 999),
        ("none", 1, 0, 999),
    ],
)
def test_stage_trains_its_indices(order: str, stage: int, low: int, high: int) -> None:
    """4,000 draws leave an end of 50 indices out with probability e^-80, of 1,000 with e^-4: seeded."""
    time = drawn(CurriculumTimes(order), DDPMLinear(), stage, count=20000)
    assert (int(time.min()), int(time.max())) == (low, high)


def test_draws_are_uniform_over_the_active_indices() -> None:
    counts = drawn(CurriculumTimes(), DDPMLinear(), stage=2, count=20000).bincount(minlength=1000)[900:]
    # 200 expected each, deviation 14
    assert float((counts - 200.0).abs().max()) < 5 * 14.1


def test_edm_draws_of_the_first_stage_lie_above_the_last_quantile() -> None:
    process = EDM()
    sigma = process.sigma(drawn(CurriculumTimes(), process, stage=1))
    assert float(sigma.min()) == pytest.approx(float(edm_quantiles(process, 20)[-2]), rel=0.01)


def test_flow_draws_of_the_first_stage_are_the_noisiest_u() -> None:
    time = drawn(CurriculumTimes(), LinearFlow(), stage=1)
    assert 0.95 <= float(time.min()) < 0.951
    assert float(time.max()) < 1.0


def test_snr_clusters_set_the_edges_of_the_sampler() -> None:
    sampler, process = CurriculumTimes(num_clusters=5, clusters="snr"), DDPMCosine(60)
    sampler.start(process, total_steps=100)
    assert int(drawn(sampler, process, stage=1).min()) == GOLDEN["snr_clusters_logsnr"][-1, 0]


def test_static_bias_has_the_mixture_of_a_curriculum_run() -> None:
    """Equal time in each of the stages, by counting: stage n draws a cluster of its n with probability 1 / n."""
    num, share = 4, 0.5
    by_hand = [0.5 / 4 + 0.5 * sum(1 / n for n in range(num - k, num + 1)) / num for k in range(num)]
    torch.testing.assert_close(curriculum.static_shares(num, share), torch.tensor(by_hand, dtype=torch.float64))
    sampler = CurriculumTimes("static_bias", num_clusters=num, static_share=share)
    time = sampler(40000, DDPMLinear(), generator()).time
    shares = (time // 250).bincount(minlength=4) / 40000
    torch.testing.assert_close(shares.double(), torch.tensor(by_hand, dtype=torch.float64), rtol=0.0, atol=0.01)


def test_no_pacing_without_a_curriculum() -> None:
    sampler = CurriculumTimes("static_bias", tau=1)
    for step in range(5):
        sampler.observe(DDPMLinear(), torch.zeros(1), torch.ones(1))
        sampler.step(step + 1)
    assert int(sampler.stage) == 1


def test_cap_ends_the_curriculum() -> None:
    sampler = CurriculumTimes(tau=100, cap_fraction=0.3)
    sampler.start(DDPMLinear(), total_steps=10)
    stages = []
    for step in range(5):
        sampler.observe(DDPMLinear(), torch.zeros(1), torch.ones(1))
        sampler.step(step + 1)
        stages.append(int(sampler.stage))
    assert stages == [1, 1, 21, 21, 21]


def test_micro_batches_count_as_one_step_of_their_mean() -> None:
    one, two = CurriculumTimes(tau=2), CurriculumTimes(tau=2)
    losses, process = torch.tensor([1.0, 2.0, 3.0, 6.0]), DDPMLinear()
    one.observe(process, torch.zeros(4), losses)
    for part in losses.split(2):
        two.observe(process, torch.zeros(2), part)
    one.step(1)
    two.step(1)
    assert float(one.best) == float(two.best) == 3.0


def test_smoothing_averages_within_a_stage_only() -> None:
    state, num, tau = curriculum.start_of_pacing(), 3, 2
    for loss in (4.0, 8.0, 8.0):
        state = curriculum.pace(state, torch.tensor(loss, dtype=torch.float64), num, tau, smoothing=0.5)
    assert int(state.stage) == 2
    state = curriculum.pace(state, torch.tensor(2.0, dtype=torch.float64), num, tau, smoothing=0.5)
    assert float(state.best) == 2.0


def test_small_improvement_does_not_reset_the_patience() -> None:
    state = curriculum.start_of_pacing()
    for loss in (1.0, 0.95):
        state = curriculum.pace(state, torch.tensor(loss, dtype=torch.float64), 3, tau=5, min_delta=0.1)
    assert (float(state.best), int(state.patience)) == (1.0, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curriculum": "reverse"}, "time_sampler.curriculum must be one of none, e2h"),
        ({"tau": 0}, "num_clusters and tau must be at least 1, got 20 and 0"),
        ({"cap_fraction": 1.5}, r"time_sampler.cap_fraction must be in \(0, 1\], got 1.5"),
        ({"smoothing": 1.0}, r"time_sampler.smoothing must be in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CurriculumTimes(**options)


# 4. parallel


def parallel_run(out: str) -> None:
    """Each rank sees its own losses; alone, the second would never change stage."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    sampler, stages = CurriculumTimes(tau=2), []
    for step in range(6):
        loss = 1.0 + step if rank == 0 else 1.0 - 0.1 * step
        sampler.observe(DDPMLinear(), torch.zeros(1), torch.tensor([loss]))
        sampler.step(step + 1)
        stages.append(int(sampler.stage))
    torch.save((stages, sampler.best), f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_ranks_change_stage_together_on_the_mean_loss(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    (stages, best), (other_stages, other_best) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    # mean losses rise by 0.45 a step: one record, two steps without one
    assert stages == other_stages == [1, 1, 2, 2, 2, 3]
    assert torch.equal(best, other_best)


# 5. resume


def test_state_comes_back_from_a_state_dict() -> None:
    losses, process = golden("pace_losses"), DDPMLinear()

    def steps(sampler: CurriculumTimes, start: int, end: int) -> None:
        for step in range(start, end):
            sampler.observe(process, torch.zeros(1), losses[step : step + 1])
            sampler.step(step + 1)

    whole, first, second = (CurriculumTimes(tau=5, smoothing=0.3) for _ in range(3))
    steps(whole, 0, 80)
    steps(first, 0, 45)
    second.load_state_dict(first.state_dict())
    steps(second, 45, 80)
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


if __name__ == "__main__":
    parallel_run(sys.argv[1])
