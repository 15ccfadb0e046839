"""config.json of DeepSeek-V3, R1 and V3.1, Moonlight and Kimi-K2, as published or as transformers writes it."""

from __future__ import annotations

from moe_models.base import ModelConfig
from moe_models.hf_fields import RouterFields, build_config
from moe_models.schema import ObjectReader


def parse_config(keys: ObjectReader) -> ModelConfig:
    """Sigmoid scores with a correction bias (`noaux_tc`); Moonlight and Kimi-K2 have one group."""
    keys.require("scoring_func", "sigmoid", because="DeepSeek-V3 routes by sigmoid scores")
    keys.require("topk_method", "noaux_tc", because="DeepSeek-V3 balances by a correction bias")
    router = RouterFields(
        scoring="sigmoid",
        topk_method="noaux_tc",
        n_group=keys.integer("n_group"),
        topk_group=keys.integer("topk_group"),
        norm_topk_prob=keys.boolean("norm_topk_prob"),
    )
    # Absent means one layer, as in transformers; whether the checkpoint holds it is seen from its tensors.
    num_nextn = keys.integer("num_nextn_predict_layers", default=1, minimum=0)
    return build_config(keys, family="deepseek_v3", router=router, num_nextn_predict_layers=num_nextn)
