"""Generative backbones under one interface: a user adds one with one file (see `Backbone`) and `register_backbone`."""

from recsim_gr.backbones.base import (
    BACKBONES,
    Backbone,
    BackboneConfig,
    Places,
    backbone_for,
    backbone_type,
    build_backbone,
    new_backbone,
    register_backbone,
)
from recsim_gr.backbones.hstu import HSTU, HSTUConfig
from recsim_gr.backbones.sasrec import SASRec, SASRecConfig
from recsim_gr.backbones.set_encoder import SetEncoder, SetEncoderConfig
from recsim_gr.backbones.titles import TitleMetadata

__all__ = [
    "BACKBONES",
    "HSTU",
    "Backbone",
    "BackboneConfig",
    "HSTUConfig",
    "Places",
    "SASRec",
    "SASRecConfig",
    "SetEncoder",
    "SetEncoderConfig",
    "TitleMetadata",
    "backbone_for",
    "backbone_type",
    "build_backbone",
    "new_backbone",
    "register_backbone",
]
