"""M3P: universal representations of images and of text in many languages.

Minheng Ni, Haoyang Huang, Lin Su, Edward Cui, Taroon Bharti, Lijuan Wang, Jianfeng Gao, Dongdong Zhang, Nan Duan: "M3P:
Learning Universal Representations via Multitask Multilingual Multimodal Pre-training", CVPR 2021, arXiv 2006.02635.

One transformer reads text alone, or the regions of an image followed by text. It is trained on three streams at once:
text of a hundred languages, images with English captions, and images with captions some of whose words are replaced by
their translations out of dictionaries. It predicts masked words and masked regions and whether image and caption
belong together; the last is what finds images for captions, and captions for images, in languages for which no image
was ever captioned.

The public names live in ``module`` (M3PPretraining, M3PRetrieval, WarmStart), ``model``, ``objective``, ``data``,
``code_switching``, ``masking``, ``evaluation`` and ``checkpoints``; import them from there, so that importing this
package costs nothing.
"""

#: What pre-training can read besides what the recipes do.
OPTIONAL_DATASETS = ("common.data.datasets.sbu.SBU",)
