"""What each status of a failed row means, and what to do about it, in one line for the report."""

from __future__ import annotations

HINTS = {
    "no_image": "the cell of manifest.image is null",
    "empty": "the file has 0 bytes; copy it again",
    "not_found": "no such file; does manifest.root point to the folder that relative paths start from?",
    "permission": "the file may not be read by the user of this job",
    "unreadable": "the disk or the server gave no bytes; a rerun of the shard may get them",
    "timeout": "reading took longer than loader.read_seconds",
    "too_many_bytes": "larger than images.max_bytes",
    "too_many_pixels": "larger than images.max_pixels",
    "not_an_image": "the bytes are no picture, whatever the name says",
    "format_not_allowed": "a format that images.formats does not list",
    "unsupported": "a variant of its format that is not decoded; convert it",
    "truncated": "the file ends early; copy or download it again",
    "corrupt": "the bytes are damaged; copy or download it again",
    "out_of_memory": "decoding it takes more than loader.decode_memory",
    "decoder_timeout": "decoding it takes longer than loader.decode_seconds",
    "decoder_crashed": "decoding it ended the decoder process",
    "outside_root": "the path leads out of manifest.root; nothing was read",
    "scheme_not_allowed": "images.schemes does not list this kind of address; nothing was read",
    "address_not_allowed": "a private or local address; images.private_hosts lists exceptions",
}
