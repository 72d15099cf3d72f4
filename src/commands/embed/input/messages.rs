//! Reader of Arrow's two formats, message by message: a file has a footer with
//! the position of each message, and a stream has one message after the other.
//!
//! The numbers that a file states are not trusted: where a message lies, how
//! long its buffers are and how large they become once decompressed is checked
//! before the library gets any of it, since the library allocates whatever a
//! buffer claims.

use std::io::Read as _;
use std::ops::ControlFlow;
use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_ipc::convert::try_fb_to_schema;
use arrow_ipc::reader::{FileDecoder, read_footer_length};
use arrow_ipc::{Block, MessageHeader, root_as_footer, root_as_message};
use arrow_schema::{ArrowError, SchemaRef};
use parquet::file::reader::Length as _;

use super::{Broken, Reading};
use crate::commands::embed::memory::ImageRoom;
use crate::commands::embed::ranged::Ranged;

const MAGIC: &[u8] = b"ARROW1";
/// Bytes at the end of a file: the footer's length, and the magic.
const TRAILER_BYTES: u64 = 10;
/// Marker of a message of the current format, before its length.
const CONTINUATION: [u8; 4] = [0xff; 4];
/// Largest footer, and largest message without its body: even a million columns
/// have less. A larger one would take memory that is not counted as image
/// memory.
const HEADER_BYTES_MAX: u64 = 16 << 20;
/// Largest padding in bytes between messages: writers align messages to 8 or
/// 64.
const PADDING_MAX: u64 = 64;
/// Largest alignment that any type of Arrow needs; a buffer that is not aligned
/// is copied.
const ALIGNMENT: u64 = 16;

/// Record batch, with the memory that it and the dictionaries take.
pub(super) struct ArrowBatch {
    pub(super) rows: RecordBatch,
    pub(super) held: u64,
}

/// Arrow file or stream whose schema has been read.
pub(super) struct Messages<'a> {
    file: &'a Ranged,
    reading: &'a Reading,
    decoder: FileDecoder,
    schema: SchemaRef,
    /// Memory of the dictionaries, held until the end of the file.
    dictionaries: Vec<ImageRoom>,
    next: Next,
    /// Description of bytes in the file that none of its batches covers, whose
    /// rows would be lost.
    uncovered: Option<String>,
}

enum Next {
    /// Blocks of a file, in reverse order: the next block is the last element.
    Blocks(Vec<Block>),
    /// Offset at which the next message of a stream begins.
    At(u64),
}

/// Makes an error of damage in a single line, whatever lines the library's text
/// has.
fn damaged(what: impl std::fmt::Display) -> Broken {
    let what = what.to_string();
    let words: Vec<&str> = what.split_whitespace().collect();
    Broken::Damaged(words.join(" "))
}

impl<'a> Messages<'a> {
    pub(super) fn open(file: &'a Ranged, reading: &'a Reading) -> Result<Self, Broken> {
        let first = bytes_at(file, 0, MAGIC.len() as u64)?;
        if first == MAGIC {
            Self::open_file(file, reading)
        } else {
            Self::open_stream(file, reading)
        }
    }

    pub(super) fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn open_file(file: &'a Ranged, reading: &'a Reading) -> Result<Self, Broken> {
        let end = file.len().checked_sub(TRAILER_BYTES);
        let end = end.ok_or_else(|| damaged("the file is too short for a footer"))?;
        let trailer = bytes_at(file, end, TRAILER_BYTES)?;
        let trailer = trailer
            .try_into()
            .map_err(|_| damaged("the file has no trailer"))?;
        let length = read_footer_length(trailer).map_err(damaged)? as u64;
        let start = end
            .checked_sub(length)
            .filter(|_| length <= HEADER_BYTES_MAX);
        let start = start.ok_or_else(|| {
            damaged(format!(
                "the footer claims {length} bytes; the file has {end} before its trailer, and the \
                 limit is {HEADER_BYTES_MAX}"
            ))
        })?;
        let footer = bytes_at(file, start, length)?;
        let footer = root_as_footer(&footer)
            .map_err(|error| damaged(format!("the footer cannot be read: {error}")))?;
        let schema = footer.schema();
        let schema = schema.ok_or_else(|| damaged("the footer has no schema"))?;
        let schema = own_schema(schema)?;
        let mut blocks: Vec<Block> = footer
            .recordBatches()
            .into_iter()
            .flatten()
            .copied()
            .collect();
        let dictionaries: Vec<Block> = footer
            .dictionaries()
            .into_iter()
            .flatten()
            .copied()
            .collect();
        let all = blocks.iter().chain(&dictionaries).copied().collect();
        let uncovered = uncovered(file, all, start)?;
        blocks.reverse();
        let mut messages = Self {
            file,
            reading,
            decoder: FileDecoder::new(Arc::clone(&schema), footer.version()),
            schema,
            dictionaries: Vec::new(),
            next: Next::Blocks(blocks),
            uncovered,
        };
        for block in &dictionaries {
            let (whole, room) = messages.load(block)?;
            messages
                .decoder
                .read_dictionary(block, &whole)
                .map_err(damaged)?;
            messages.dictionaries.push(room);
        }
        Ok(messages)
    }

    fn open_stream(file: &'a Ranged, reading: &'a Reading) -> Result<Self, Broken> {
        let block = next_of_stream(file, 0)?;
        let block = block.ok_or_else(|| damaged("the stream has no schema"))?;
        let (start, length) = (size(block.offset())?, size(block.metaDataLength().into())?);
        let header = bytes_at(file, start, length)?;
        let message = root_as_message(unprefixed(&header)).map_err(damaged)?;
        let schema = message.header_as_schema();
        let schema = schema.ok_or_else(|| damaged("the stream does not begin with a schema"))?;
        let schema = own_schema(schema)?;
        Ok(Self {
            file,
            reading,
            decoder: FileDecoder::new(Arc::clone(&schema), message.version()),
            schema,
            dictionaries: Vec::new(),
            next: Next::At(end_of(&block)?),
            uncovered: None,
        })
    }

    /// Hands on all batches, until `visit` breaks.
    pub(super) fn each(
        &mut self,
        mut visit: impl FnMut(ArrowBatch) -> Result<ControlFlow<()>, Broken>,
    ) -> Result<(), Broken> {
        while let Some(block) = self.next_block()? {
            let (whole, room) = self.load(&block)?;
            let header = size(block.metaDataLength().into())?;
            let header = whole.get(..usize::try_from(header).map_err(damaged)?);
            let message = root_as_message(unprefixed(header.unwrap_or_default()));
            if message.map_err(damaged)?.header_type() == MessageHeader::DictionaryBatch {
                self.decoder
                    .read_dictionary(&block, &whole)
                    .map_err(damaged)?;
                self.dictionaries.push(room);
                continue;
            }
            let rows = self.decoder.read_record_batch(&block, &whole);
            let Some(rows) = rows.map_err(|error: ArrowError| damaged(error))? else {
                continue;
            };
            let held = room.bytes().saturating_add(self.held());
            if visit(ArrowBatch { rows, held })?.is_break() {
                return Ok(());
            }
        }
        self.uncovered
            .take()
            .map_or(Ok(()), |what| Err(damaged(what)))
    }

    fn next_block(&mut self) -> Result<Option<Block>, Broken> {
        match &mut self.next {
            Next::Blocks(blocks) => Ok(blocks.pop()),
            Next::At(at) => {
                let block = next_of_stream(self.file, *at)?;
                match &block {
                    Some(block) => *at = end_of(block)?,
                    None => self.uncovered = after_stream(self.file, *at),
                }
                Ok(block)
            }
        }
    }

    /// Loads a message with its body, in room for both and for the memory that
    /// decoding takes.
    fn load(&self, block: &Block) -> Result<(arrow_buffer::Buffer, ImageRoom), Broken> {
        let (start, header) = (size(block.offset())?, size(block.metaDataLength().into())?);
        let body = size(block.bodyLength())?;
        let whole = header.saturating_add(body);
        let end = end_of(block)?;
        if !(8..=HEADER_BYTES_MAX).contains(&header) || end > self.file.len() {
            return Err(damaged(format!(
                "a message claims a header of {header} bytes and a body of {body} at offset \
                 {start}; the file has {} bytes",
                self.file.len()
            )));
        }
        let mut room = self.room(whole)?;
        let bytes = bytes_at(self.file, start, whole)?;
        let split = usize::try_from(header).map_err(damaged)?;
        let (header_bytes, body_bytes) = bytes.split_at_checked(split).unwrap_or_default();
        let more = claimed(header_bytes, body_bytes)?;
        if more > 0 {
            // The room is released before a larger one is acquired: a reader
            // that holds one room and waits for another could wait for itself.
            let all = whole.saturating_add(more);
            self.fits(all)?;
            drop(room);
            room = self.room(all)?;
        }
        Ok((arrow_buffer::Buffer::from_vec(bytes), room))
    }

    fn room(&self, bytes: u64) -> Result<ImageRoom, Broken> {
        self.fits(bytes)?;
        let memory = &self.reading.memory;
        let room = memory.blocking_room(&self.reading.runtime, bytes);
        room.ok_or_else(|| Broken::Failed(anyhow::anyhow!("the job has ended")))
    }

    /// Returns the memory of the dictionaries.
    fn held(&self) -> u64 {
        self.dictionaries.iter().map(ImageRoom::bytes).sum()
    }

    fn fits(&self, bytes: u64) -> Result<(), Broken> {
        let held = self.held();
        let limit = self.reading.memory.limit();
        if bytes.saturating_add(held) <= limit {
            return Ok(());
        }
        Err(Broken::OverLimit(format!(
            "a record batch takes {bytes} bytes{}, over the limit of {limit} (--image-memory)",
            if held > 0 {
                format!(" and its dictionaries {held}")
            } else {
                String::new()
            }
        )))
    }
}

fn own_schema(schema: arrow_ipc::Schema<'_>) -> Result<SchemaRef, Broken> {
    if !schema.endianness().equals_to_target_endianness() {
        return Err(damaged(
            "the file's numbers have another byte order than this machine's",
        ));
    }
    try_fb_to_schema(schema).map(Arc::new).map_err(damaged)
}

fn size(claimed: i64) -> Result<u64, Broken> {
    let size = u64::try_from(claimed);
    size.map_err(|_| damaged(format!("a message claims a length or offset of {claimed}")))
}

/// Returns the flatbuffer of a message, without the length before it.
fn unprefixed(message: &[u8]) -> &[u8] {
    let prefix = if message.starts_with(&CONTINUATION) {
        8
    } else {
        4
    };
    message.get(prefix..).unwrap_or_default()
}

fn end_of(block: &Block) -> Result<u64, Broken> {
    let start = size(block.offset())?;
    let header = size(block.metaDataLength().into())?;
    let end = start.checked_add(header);
    end.and_then(|end| end.checked_add(u64::try_from(block.bodyLength()).ok()?))
        .ok_or_else(|| damaged("a message claims an end beyond the largest possible file"))
}

/// Finds the message that begins at offset `at`; `None` at the end of the
/// stream, which may be marked or not.
fn next_of_stream(file: &Ranged, at: u64) -> Result<Option<Block>, Broken> {
    let left = file.len().saturating_sub(at);
    if left < 4 {
        return Ok(None);
    }
    let prefix = bytes_at(file, at, left.min(8))?;
    let (length, prefix_bytes) = match prefix.strip_prefix(&CONTINUATION) {
        Some(length) => (length, 8),
        None => (&prefix[..4], 4),
    };
    let Ok(length) = length.try_into().map(i32::from_le_bytes) else {
        return Ok(None);
    };
    if length == 0 {
        return Ok(None);
    }
    let length = size(length.into())?;
    if length > HEADER_BYTES_MAX || length > left - prefix_bytes {
        return Err(damaged(format!(
            "a message claims a header of {length} bytes at offset {at}; the file has {} bytes",
            file.len()
        )));
    }
    let header = bytes_at(file, at + prefix_bytes, length)?;
    let message = root_as_message(&header).map_err(damaged)?;
    let whole = i32::try_from(length + prefix_bytes).map_err(damaged)?;
    let start = i64::try_from(at).map_err(damaged)?;
    Ok(Some(Block::new(start, whole, message.bodyLength())))
}

/// Describes the bytes after the end of a stream, if there are any.
fn after_stream(file: &Ranged, at: u64) -> Option<String> {
    let left = file.len().saturating_sub(at);
    // The end is marked as in the current format, as in the older format, or
    // not at all.
    let is_end = matches!(left, 0 | 4 | 8);
    (!is_end).then(|| {
        format!(
            "the stream ends at offset {at} of {} bytes in the file; the bytes after the end are \
             not read",
            file.len()
        )
    })
}

/// Describes the bytes between the schema and the footer that no message of the
/// footer covers, if there are any.
fn uncovered(file: &Ranged, mut blocks: Vec<Block>, footer: u64) -> Result<Option<String>, Broken> {
    // The magic is padded to the writer's alignment.
    let head = bytes_at(file, 0, footer.min(PADDING_MAX + 8))?;
    let words = head.chunks(8).enumerate().skip(1);
    let schema = words
        .map(|(place, word)| (place as u64 * 8, word))
        .find(|(_, word)| word.iter().any(|&byte| byte != 0))
        .map(|(place, _)| place);
    let schema = schema.ok_or_else(|| damaged("no schema follows its magic"))?;
    let schema = next_of_stream(file, schema)?;
    let schema = schema.ok_or_else(|| damaged("no schema follows its magic"))?;
    blocks.sort_unstable_by_key(Block::offset);
    let mut covered = end_of(&schema)?;
    for block in &blocks {
        // A block with a wrong position is reported as damage when it is read.
        let (Ok(start), Ok(end)) = (size(block.offset()), end_of(block)) else {
            return Ok(None);
        };
        if start > covered.saturating_add(PADDING_MAX) {
            break;
        }
        covered = covered.max(end);
    }
    let left = footer.saturating_sub(covered);
    Ok((left > PADDING_MAX + 8).then(|| {
        format!(
            "the footer names none of the {left} bytes at offset {covered}; their rows are not read"
        )
    }))
}

/// Returns the memory that the library allocates for a message besides its
/// bytes, as its buffers claim.
fn claimed(header: &[u8], body: &[u8]) -> Result<u64, Broken> {
    let message = root_as_message(unprefixed(header)).map_err(damaged)?;
    let batch = match message.header_type() {
        MessageHeader::RecordBatch => message.header_as_record_batch(),
        MessageHeader::DictionaryBatch => message
            .header_as_dictionary_batch()
            .and_then(|dictionary| dictionary.data()),
        // The library refuses messages of other types.
        _ => return Ok(0),
    };
    let batch = batch.ok_or_else(|| damaged("a message has no record batch"))?;
    let is_compressed = batch.compression().is_some();
    let mut all = 0_u64;
    for buffer in batch.buffers().into_iter().flatten() {
        let (start, length) = (size(buffer.offset())?, size(buffer.length())?);
        let end = start
            .checked_add(length)
            .filter(|&end| end <= body.len() as u64);
        let range =
            end.and_then(|end| Some(usize::try_from(start).ok()?..usize::try_from(end).ok()?));
        let content = range.and_then(|range| body.get(range)).ok_or_else(|| {
            damaged(format!(
                "a buffer claims {length} bytes at offset {start}; its message has {} bytes",
                body.len()
            ))
        })?;
        if content.is_empty() {
            continue;
        }
        if !is_compressed {
            let at = start.saturating_add(header.len() as u64);
            if !at.is_multiple_of(ALIGNMENT) {
                all = all.saturating_add(length);
            }
            continue;
        }
        let claim = content
            .first_chunk()
            .map(|claim| i64::from_le_bytes(*claim));
        match claim {
            // The buffer is stored without compression.
            Some(-1) => {}
            Some(claim) => all = all.saturating_add(size(claim)?),
            None => return Err(damaged("a compressed buffer does not state its length")),
        }
    }
    Ok(all)
}

fn bytes_at(file: &Ranged, at: u64, length: u64) -> Result<Vec<u8>, Broken> {
    if at.checked_add(length).is_none_or(|end| end > file.len()) {
        return Err(damaged("the file ends in the middle of a message"));
    }
    let mut bytes = vec![0; usize::try_from(length).map_err(damaged)?];
    file.from(at).read_exact(&mut bytes).map_err(damaged)?;
    Ok(bytes)
}
