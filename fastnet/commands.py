"""What the command lines share: how they are parsed."""

from __future__ import annotations

from typing import Any

from fastnet.arch import VARIANTS, Variant, coefficients, variant_name


def parse(what: Any, **options: Any) -> Any:
    """`tyro.cli` in which a variant may also be called B0 or efficientnet_b0, and options that commands share are flags
    like their own."""
    import tyro
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def variant(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        named: object = Variant
        if info.type != named:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="{" + ",".join(VARIANTS) + "}",
            instance_from_str=lambda words: variant_name(words[0]),
            is_instance=_is_variant,
            str_from_instance=lambda name: [name],
        )

    return tyro.cli(what, registry=registry, config=(tyro.conf.OmitArgPrefixes,), **options)


def _is_variant(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(coefficients(value))
    except ValueError:
        return False
