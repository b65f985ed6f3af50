"""The suites that Hydra ships for every sweeper, on ours; a grid is what they expect of one.

All but BatchedSweeperTestSuite: it wants jobs returned in batches, and ours has no batches.
"""

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.test_utils.launcher_common_tests import IntegrationTestSuite, LauncherTestSuite
from hydra.version import _UNSPECIFIED_, VersionBase
from pytest import fixture, mark

# The suites' apps name no version_base, of which Hydra warns.
pytestmark = mark.filterwarnings("ignore:Future Hydra versions", "ignore:\n")
FLAGS = ["hydra/sweeper=peftlab", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_trials=null"]


@fixture(autouse=True)
def no_version_base_from_another_test(monkeypatch):
    monkeypatch.setattr(VersionBase.instance(), "version_base", _UNSPECIFIED_)


def test_hydra_finds_the_plugins():
    assert "PeftlabSweeper" in [c.__name__ for c in Plugins.instance().discover(Sweeper)]
    assert "WorkersLauncher" in [c.__name__ for c in Plugins.instance().discover(Launcher)]


@mark.parametrize("launcher_name, overrides", [("basic", FLAGS)])
class TestSweeper(LauncherTestSuite):
    test_sweep_with_custom_resolver = None  # returns a text: an objective is a number


@mark.parametrize("task_launcher_cfg, extra_flags", [({}, ["-m", *FLAGS])])
class TestIntegration(IntegrationTestSuite):
    test_to_absolute_path_multirun = None  # the same study twice: ours has nothing left to do
