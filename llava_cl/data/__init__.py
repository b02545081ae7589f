"""Records, conversations and images of an instruction-tuning task, and the batches made from them."""

from llava_cl.data.augment import Augmented, Plain
from llava_cl.data.chat import ChatFormat, VicunaChat, chat_format
from llava_cl.data.class_folders import ClassDataset, ClassRecord, collate_images, load_class_records
from llava_cl.data.collate import collate_prompts, collate_train
from llava_cl.data.conversation import IGNORE_INDEX, IMAGE_MARKER, encode_conversation, encode_prompt
from llava_cl.data.dataset import PADDING_INDEX, ConversationDataset, QuestionDataset, UnusableSample
from llava_cl.data.images import (
    CLIP_MEAN,
    CLIP_STD,
    check_image,
    load_image,
    load_thumbnail,
    preprocess_image,
    resolve_image,
)
from llava_cl.data.records import (
    CaptionReference,
    QuestionRecord,
    TrainRecord,
    load_caption_references,
    load_question_records,
    load_train_records,
)
from llava_cl.data.sampler import (
    GlobalBatchSampler,
    length_grouped_indices,
    measurement_indices,
    modality_lengths,
)

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "IGNORE_INDEX",
    "IMAGE_MARKER",
    "PADDING_INDEX",
    "Augmented",
    "CaptionReference",
    "ChatFormat",
    "ClassDataset",
    "ClassRecord",
    "ConversationDataset",
    "GlobalBatchSampler",
    "Plain",
    "QuestionDataset",
    "QuestionRecord",
    "TrainRecord",
    "UnusableSample",
    "VicunaChat",
    "chat_format",
    "check_image",
    "collate_images",
    "collate_prompts",
    "collate_train",
    "encode_conversation",
    "encode_prompt",
    "length_grouped_indices",
    "load_caption_references",
    "load_class_records",
    "load_image",
    "load_question_records",
    "load_thumbnail",
    "load_train_records",
    "measurement_indices",
    "modality_lengths",
    "preprocess_image",
    "resolve_image",
]
