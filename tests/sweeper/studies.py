"""Studies without Hydra's jobs, for tests of what the sweeper draws and keeps."""

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from optuna.pruners import NopPruner

from hydra_plugins.peftlab_sweeper._samplers import Suggester
from hydra_plugins.peftlab_sweeper._space import read_space
from hydra_plugins.peftlab_sweeper._study import Book, directions_of
from hydra_plugins.peftlab_sweeper.conf import SAMPLERS
from peftlab.storage import open_storage


def space_of(*words, when=None):
    return read_space(words, [], when or {}, OverridesParser.create())


def book_of(folder, url="journal:study.journal", directions=("minimize",)):
    return Book(open_storage(url, folder), "study", directions_of(list(directions)), folder)


def suggester(space, sampler="tpe", seed=7, enqueue=(), **settings):
    node = OmegaConf.create({**SAMPLERS[sampler], **settings})
    return Suggester(space, node, NopPruner(), seed, enqueue, directions_of("minimize"))


def value_of(point):
    return (point["x"] - 2) ** 2 + abs(point["k"] - 3)


def play(folder, source, n, url="journal:study.journal", value=value_of):
    """A session of a sweep: trials one after another until the study has n."""
    with book_of(folder, url) as book:
        for _ in range(n - len(book.trials())):
            number = book.add(source.next(book.study))
            book.complete(number, [[value(book.point(number))]])
        return [trial.params for trial in book.trials()]
