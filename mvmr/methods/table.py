"""The methods, by the name that recipes and `--method` call them."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from mvmr.methods.barlow import Barlow, BarlowConfig
from mvmr.methods.byol import Byol, ByolConfig
from mvmr.methods.deepcluster import Deepcluster, DeepclusterConfig
from mvmr.methods.deepercluster import Deepercluster, DeeperclusterConfig
from mvmr.methods.dino import Dino, DinoConfig
from mvmr.methods.distillers.combination import CombinationConfig
from mvmr.methods.distillers.distiller import Distiller
from mvmr.methods.distillers.table import DISTILLERS
from mvmr.methods.isd import Isd, IsdConfig
from mvmr.methods.lejepa import Lejepa, LejepaConfig
from mvmr.methods.method import Method, MethodConfig, Setting
from mvmr.methods.moco import Moco, MocoConfig
from mvmr.methods.mvmr import Mvmr, MvmrConfig
from mvmr.methods.selflabel import Selflabel, SelflabelConfig
from mvmr.methods.simclr import Simclr, SimclrConfig
from mvmr.methods.simsiam import Simsiam, SimsiamConfig
from mvmr.methods.swav import Swav, SwavConfig
from mvmr.methods.twist import Twist, TwistConfig
from mvmr.methods.vicreg import Vicreg, VicregConfig


class Entry(NamedTuple):
    """config: its settings; method: built from them, an encoder and a `Setting`."""

    config: type[MethodConfig]
    method: Any  # each takes its own settings


METHODS = {
    "mvmr": Entry(MvmrConfig, Mvmr),
    "simclr": Entry(SimclrConfig, Simclr),
    "moco": Entry(MocoConfig, Moco),
    "byol": Entry(ByolConfig, Byol),
    "simsiam": Entry(SimsiamConfig, Simsiam),
    "barlow": Entry(BarlowConfig, Barlow),
    "vicreg": Entry(VicregConfig, Vicreg),
    "swav": Entry(SwavConfig, Swav),
    "dino": Entry(DinoConfig, Dino),
    "isd": Entry(IsdConfig, Isd),
    "twist": Entry(TwistConfig, Twist),
    "deepcluster": Entry(DeepclusterConfig, Deepcluster),
    "deepercluster": Entry(DeeperclusterConfig, Deepercluster),
    "selflabel": Entry(SelflabelConfig, Selflabel),
    "lejepa": Entry(LejepaConfig, Lejepa),
    **{name: Entry(config, Distiller) for name, config in DISTILLERS.items()},
    "combination": Entry(CombinationConfig, Distiller),
}
CONFIGS = {name: entry.config for name, entry in METHODS.items()}


def build_method(config: MethodConfig, encoder: nn.Module, setting: Setting) -> Method:
    """The method of these settings; weights of what is beside the encoder are drawn from torch's global generator."""
    method: Method = METHODS[config.name].method(config, encoder, setting)
    return method
