"""Which pieces of a vocabulary the objectives and generation use."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Specials:
  """Ids of the pieces that the objectives and generation use; None where there is none.

  Attributes:
    mask: stands for a span.
    gmask: stands for the rest of a text.
    smask: stands for a sentence.
    sop: opens a span.
    eop: closes it.
    enc: opens a document.
    dblock: noise in a span's input.
    eos: ends a document.
    pad: fills rows up; never seen.
  """

  mask: int
  gmask: int | None
  smask: int | None
  sop: int
  eop: int
  enc: int | None
  dblock: int | None
  eos: int
  pad: int

  @classmethod
  def of(
    cls,
    control: dict[str, int],
    *,
    sop: str,
    eop: str,
    eos: int,
    pad: int,
    enc: str = '',
    dblock: str = '',
  ) -> Specials:
    """From the ids of control pieces; `sop`, `eop`, `enc` and `dblock` are their names."""
    return cls(
      mask=control['[MASK]'],
      gmask=control['[gMASK]'],
      smask=control['[sMASK]'],
      sop=control[sop],
      eop=control[eop],
      enc=control.get(enc),
      dblock=control.get(dblock),
      eos=eos,
      pad=pad,
    )
