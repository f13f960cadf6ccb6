"""Map each data set to a function that writes a tiny copy in its layout and returns the folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from common.data.datasets.audioset import AudioSet, write_audioset
from common.data.datasets.avsd import AVSD
from common.data.datasets.base import MediaDataset
from common.data.datasets.coco import COCO
from common.data.datasets.coco_2014 import COCO2014
from common.data.datasets.coco_karpathy import COCOKarpathy
from common.data.datasets.conceptual_captions import ConceptualCaptions
from common.data.datasets.dcase import DCASE2014, write_dcase
from common.data.datasets.esc50 import ESC50, write_esc50
from common.data.datasets.hmdb51 import HMDB51, write_hmdb51
from common.data.datasets.imagenet import ImageNet
from common.data.datasets.kinetics import Kinetics400, write_kinetics
from common.data.datasets.localized_narratives import LocalizedNarrativesCOCO
from common.data.datasets.multi30k import Multi30K
from common.data.datasets.tvc import TVC
from common.data.datasets.tvqa import TVQA
from common.data.datasets.ucf101 import UCF101, write_ucf101
from common.data.datasets.voc import PascalVOC
from tests.data.image_layouts import (
    write_coco,
    write_conceptual_captions,
    write_imagenet,
    write_karpathy,
    write_ln_coco,
    write_multi30k,
    write_voc,
)
from tests.data.text_layouts import write_avsd, write_tvc, write_tvqa

WRITERS: dict[type[MediaDataset], Callable[[Path], Path]] = {
    Kinetics400: write_kinetics,
    AudioSet: write_audioset,
    UCF101: write_ucf101,
    HMDB51: write_hmdb51,
    ESC50: write_esc50,
    DCASE2014: write_dcase,
    COCO: write_coco,
    COCO2014: lambda root: write_coco(root, year="2014"),
    COCOKarpathy: write_karpathy,
    PascalVOC: write_voc,
    ImageNet: write_imagenet,
    LocalizedNarrativesCOCO: write_ln_coco,
    ConceptualCaptions: write_conceptual_captions,
    Multi30K: write_multi30k,
    TVQA: write_tvqa,
    TVC: lambda root: write_tvc(write_tvqa(root.parent / "tvqa").parent / root.name),
    AVSD: write_avsd,
}
