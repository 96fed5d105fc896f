"""The models of the comparison: how to make each, what it takes, where its numbers come from.

Ours first, then the same model computed otherwise, then what people would use instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.peers import bert, padded, scbert, scfoundation, scgpt, tosica, uce
from bench.peers.annotators import Annotator, build
from bench.peers.flash_cellpatch import FlashCellPatch
from bench.peers.ours import CellPatch

__all__ = ["ENVIRONMENT", "PEERS", "Annotator", "Make", "Peer"]

Make = Callable[[torch.device, torch.dtype, int], Annotator]

# Of processes that measure on a CPU. Without it glibc returns every large tensor to the system, and
# the next one is cleared page by page: a cell of 2,000 genes took scBERT 16 s of one core, not 7,
# the original 3.1 ms, not 2.0, and flash attention 1.5 ms, not 1.1; ours 0.5 either way.
ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": str(10**9),
    "MALLOC_TRIM_THRESHOLD_": str(10**11),
}


@dataclass(frozen=True)
class Peer:
    """A model of the comparison.

    Parameters
    ----------
    key, name
        For options, and for tables and figures.
    make
        Takes a device, a dtype and the number of classes. Raises an ImportError that names what to
        install where its package is missing.
    tokens
        The length of the sequence that is computed for a cell of so many genes: two numbers of
        genes with the same are measured once.
    cap
        The most genes of a cell that it takes, the others are ignored; None: it takes all.
    architecture, setting
        One line each: its sizes; how it is run.
    published
        Number of parameters that its authors state; None where they do not.
    source
        Where sizes and numbers were found.
    assumed
        What was not found, or is done otherwise than in the authors' code.
    ours
        Whether it is ours.
    package
        What has to be installed for it, besides PyTorch.
    """

    key: str
    name: str
    make: Make
    tokens: Callable[[int], int]
    cap: int | None
    architecture: str
    setting: str
    published: int | None
    source: str
    assumed: str = ""
    ours: bool = False
    package: str | None = None


def _making(model: Callable[[int], Annotator]) -> Make:
    return lambda device, dtype, classes: build(lambda: model(classes), device, dtype)


CELLPATCH = "64 patches, d 32, 2 heads, MLP 64; one cross-attention, two self-attention blocks"

PEERS: tuple[Peer, ...] = (
    Peer(
        key="ours",
        name="CellPatch (ours)",
        make=_making(CellPatch),
        tokens=lambda genes: genes,
        cap=None,
        architecture=CELLPATCH,
        setting="cellpatch-fast, the device's backend; ragged",
        published=None,
        source="cellpatch_fast.CellPatchConfig, the paper's numbers",
        ours=True,
    ),
    Peer(
        key="cellpatch-flash",
        name="CellPatch, flash attention",
        make=_making(FlashCellPatch),
        tokens=lambda genes: genes,
        cap=None,
        architecture=CELLPATCH,
        setting="PyTorch's varlen_attn on a GPU in half precision, else padded SDPA",
        published=None,
        source="the same model as ours",
    ),
    Peer(
        key="cellpatch-original",
        name="CellPatch, original",
        make=_making(padded.PaddedCellPatch),
        tokens=lambda genes: min(genes, padded.CAP),
        cap=padded.CAP,
        architecture=CELLPATCH,
        setting="padded, padding attended to; nn.MultiheadAttention with weights, as released",
        published=None,
        source="the computation of the released code, written anew",
        assumed="a cell beyond the cap keeps its first genes; no projection, as ours",
    ),
    Peer(
        key="scbert",
        name="scBERT",
        make=_making(scbert.ScBERT),
        tokens=scbert.PUBLISHED.tokens,
        cap=scbert.PUBLISHED.genes,
        architecture="Performer, 6 layers, d 200, 10 heads of 64, MLP 800; all 16,906 genes",
        setting="performer-pytorch",
        published=None,
        source="finetune.py of TencentAILabHealthcare/scBERT: sizes, classification head",
        assumed="the classifier's convolution is written as the matrix product that it is",
        package="performer-pytorch",
    ),
    Peer(
        key="scgpt",
        name="scGPT",
        make=_making(scgpt.ScGPT),
        tokens=scgpt.PUBLISHED.tokens,
        cap=scgpt.PUBLISHED.sequence - 1,
        architecture="transformer, 12 layers, d 512, 8 heads, MLP 512, post-norm; a random sample",
        setting="SDPA",
        published=None,
        source="args.json, model.py and data_collator.py of bowang-lab/scGPT; 60,697 tokens: "
        "huggingface.co/tdc/scGPT. The 1,200 tokens include the cell's own",
        assumed="values are not binned anew",
    ),
    Peer(
        key="geneformer-v1",
        name="Geneformer V1",
        make=_making(lambda classes: bert.Bert(bert.GENEFORMER_V1, classes)),
        tokens=bert.GENEFORMER_V1.tokens,
        cap=bert.GENEFORMER_V1.cap,
        architecture="BERT, 6 layers, d 256, 4 heads, MLP 512; genes ranked by value",
        setting="transformers, SDPA",
        published=10_000_000,
        source="config.json of huggingface.co/ctheodoris/Geneformer; its name V1-10M",
        assumed="no pooler; values ranked as they are, not by their ratio to a gene's median",
        package="transformers",
    ),
    Peer(
        key="geneformer-v2",
        name="Geneformer V2",
        make=_making(lambda classes: bert.Bert(bert.GENEFORMER_V2, classes)),
        tokens=bert.GENEFORMER_V2.tokens,
        cap=bert.GENEFORMER_V2.cap,
        architecture="BERT, 12 layers, d 768, 12 heads, MLP 3,072; genes ranked by value",
        setting="transformers, SDPA",
        published=104_000_000,
        source="the author's card at virtualcellmodels.cziscience.com/model/geneformer: layers, "
        "width, heads, 4,096 tokens, 104 million; its tokenizer puts a token before the genes and "
        "one behind",
        assumed="an MLP of four widths and the 20,275 tokens of its vocabulary, with which it has "
        "104 million parameters; no pooler; values ranked as they are",
        package="transformers",
    ),
    Peer(
        key="scfoundation",
        name="scFoundation",
        make=_making(scfoundation.ScFoundation),
        tokens=scfoundation.PUBLISHED.tokens,
        cap=scfoundation.PUBLISHED.genes,
        architecture="transformer, 12 layers, d 768, 12 heads, MLP 3,072; expressed genes and 2",
        setting="SDPA",
        published=100_000_000,
        source="abstract of its paper: 100 million; model/ of biomap-research/scFoundation: "
        "tokens, layers, classifier",
        assumed="100 bins of values, the paper's number",
    ),
    Peer(
        key="scfoundation-decoder",
        name="scFoundation with decoder",
        make=_making(lambda classes: scfoundation.ScFoundation(classes, decoder=True)),
        tokens=lambda genes: (
            scfoundation.PUBLISHED.tokens(genes) + scfoundation.PUBLISHED.genes + 2
        ),
        cap=scfoundation.PUBLISHED.genes,
        architecture="as its encoder, then Performer, 6 layers, d 512, 8 heads of 64, over all "
        "19,266 tokens",
        setting="SDPA, performer-pytorch",
        published=None,
        source="as its encoder",
        assumed="8 heads of 64; the classifier reads the maximum over all genes, as the published "
        "one does over the encoder's",
        package="performer-pytorch",
    ),
    Peer(
        key="langcell",
        name="LangCell",
        make=_making(lambda classes: bert.Bert(bert.LANGCELL, classes)),
        tokens=bert.LANGCELL.tokens,
        cap=bert.LANGCELL.cap,
        architecture="BERT, 12 layers, d 512, 8 heads, MLP 1,024; genes ranked by value",
        setting="transformers, SDPA",
        published=None,
        source="LangCell-CE-annotation of PharMolix/LangCell: a BertModel over the tokens of "
        "Geneformer V1 and one before them, 2,048 in all",
        assumed="the sizes of Geneformer V1's larger model (12L-30M); no pooler; values ranked as "
        "they are",
        package="transformers",
    ),
    Peer(
        key="uce-4",
        name="UCE, 4 layers",
        make=_making(lambda classes: uce.UCE(classes, uce.SMALL)),
        tokens=uce.SMALL.tokens,
        cap=uce.SMALL.drawn,
        architecture="transformer, 4 layers, d 1,280, 20 heads, MLP 5,120; 1,024 genes drawn",
        setting="SDPA",
        published=None,
        source="model.py, eval_data.py and README of snap-stanford/UCE; its padding to 1,536 "
        "tokens is cut at the longest of a batch",
        assumed="24 chromosomes, all of them drawn from; a table of human proteins only; a linear "
        "classifier on the embedding",
    ),
    Peer(
        key="uce-33",
        name="UCE, 33 layers",
        make=_making(uce.UCE),
        tokens=uce.PUBLISHED.tokens,
        cap=uce.PUBLISHED.drawn,
        architecture="transformer, 33 layers, d 1,280, 20 heads, MLP 5,120; 1,024 genes drawn",
        setting="SDPA",
        published=650_000_000,
        source="as its smaller model; 650 million: the author's card at "
        "virtualcellmodels.cziscience.com/model/uce",
        assumed="as its smaller model",
    ),
    Peer(
        key="tosica",
        name="TOSICA",
        make=_making(tosica.TOSICA),
        tokens=tosica.PUBLISHED.tokens,
        cap=None,
        architecture="masked linear layer from all genes to 300 gene sets, then 2 layers, d 48, "
        "4 heads",
        setting="dense product, masked once; SDPA",
        published=None,
        source="TOSICA_model.py, customized_linear.py and train.py of JackieHanLab/TOSICA",
        assumed="19,264 genes in the data set; sets of 1.5 % of them, its default for random masks",
    ),
)
