//! Arrow's two formats, message by message: a file has a footer that says where
//! each begins, a stream has one after the other.
//!
//! A file's own numbers are not believed: where a message lies, how long its
//! buffers are and how large they are once decompressed is looked at before the
//! library is given any of it, since it allocates what a buffer claims.

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
/// Marker of a message of today's format, before its length.
const CONTINUATION: [u8; 4] = [0xff; 4];
/// A footer or a message without its body: a million columns have less. Much
/// more would be memory that no image takes.
const HEADER_BYTES_MAX: u64 = 16 << 20;
/// Bytes of padding between messages: writers align them to 8 or 64.
const PADDING_MAX: u64 = 64;
/// The alignment that no type of Arrow asks more than; what lies otherwise is
/// copied.
const ALIGNMENT: u64 = 16;

/// A batch, with the memory that it and the dictionaries take.
pub(super) struct ArrowBatch {
    pub(super) rows: RecordBatch,
    pub(super) held: u64,
}

/// A file or a stream whose schema has been read.
pub(super) struct Messages<'a> {
    file: &'a Ranged,
    reading: &'a Reading,
    decoder: FileDecoder,
    schema: SchemaRef,
    /// Memory of dictionaries until the end.
    dictionaries: Vec<ImageRoom>,
    next: Next,
    /// What the file holds that none of its batches covers: rows that would be lost.
    uncovered: Option<String>,
}

enum Next {
    /// Blocks of a file, the next one last.
    Blocks(Vec<Block>),
    /// Where the next message of a stream begins.
    At(u64),
}

/// Damage in one line, whatever lines the library makes of it.
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
        let trailer = trailer.try_into().map_err(|_| damaged("no trailer"))?;
        let length = read_footer_length(trailer).map_err(damaged)? as u64;
        let start = end
            .checked_sub(length)
            .filter(|_| length <= HEADER_BYTES_MAX);
        let start = start.ok_or_else(|| {
            damaged(format!(
                "its footer claims {length} bytes, of {end} in the file"
            ))
        })?;
        let footer = bytes_at(file, start, length)?;
        let footer = root_as_footer(&footer)
            .map_err(|error| damaged(format!("its footer cannot be read: {error}")))?;
        let schema = footer.schema();
        let schema = schema.ok_or_else(|| damaged("its footer has no schema"))?;
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

    /// A message with its body, in room for it and for what is made of it.
    fn load(&self, block: &Block) -> Result<(arrow_buffer::Buffer, ImageRoom), Broken> {
        let (start, header) = (size(block.offset())?, size(block.metaDataLength().into())?);
        let body = size(block.bodyLength())?;
        let whole = header.saturating_add(body);
        let end = end_of(block)?;
        if !(8..=HEADER_BYTES_MAX).contains(&header) || end > self.file.len() {
            return Err(damaged(format!(
                "a message claims to be {header} and {body} bytes at {start}, of {} in the file",
                self.file.len()
            )));
        }
        let mut room = self.room(whole)?;
        let bytes = bytes_at(self.file, start, whole)?;
        let split = usize::try_from(header).map_err(damaged)?;
        let (header_bytes, body_bytes) = bytes.split_at_checked(split).unwrap_or_default();
        let more = claimed(header_bytes, body_bytes)?;
        if more > 0 {
            // Given back first: whoever holds one room and waits for another
            // could wait for itself.
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

    /// Memory of the dictionaries.
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
                format!(" and dictionaries {held}")
            } else {
                String::new()
            }
        )))
    }
}

fn own_schema(schema: arrow_ipc::Schema<'_>) -> Result<SchemaRef, Broken> {
    if !schema.endianness().equals_to_target_endianness() {
        return Err(damaged("its numbers have the other byte order"));
    }
    try_fb_to_schema(schema).map(Arc::new).map_err(damaged)
}

fn size(claimed: i64) -> Result<u64, Broken> {
    let size = u64::try_from(claimed);
    size.map_err(|_| damaged(format!("a message claims a length or place of {claimed}")))
}

/// The flatbuffer of a message that begins with its length.
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
        .ok_or_else(|| damaged("a message claims to end past all files"))
}

/// The message that begins at `at`; `None` at the end of the stream, which may
/// be marked or not.
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
            "a message claims a header of {length} bytes at {at}, of {} in the file",
            file.len()
        )));
    }
    let header = bytes_at(file, at + prefix_bytes, length)?;
    let message = root_as_message(&header).map_err(damaged)?;
    let whole = i32::try_from(length + prefix_bytes).map_err(damaged)?;
    let start = i64::try_from(at).map_err(damaged)?;
    Ok(Some(Block::new(start, whole, message.bodyLength())))
}

/// What follows the end of a stream, if anything does.
fn after_stream(file: &Ranged, at: u64) -> Option<String> {
    let left = file.len().saturating_sub(at);
    // A mark of today's format, of the older one, or none.
    let is_end = matches!(left, 0 | 4 | 8);
    (!is_end).then(|| {
        format!(
            "its stream ends at {at}, of {} in the file: what follows is not read",
            file.len()
        )
    })
}

/// Bytes between the schema and the footer that no message of the footer covers.
fn uncovered(file: &Ranged, mut blocks: Vec<Block>, footer: u64) -> Result<Option<String>, Broken> {
    // The magic is filled up to the writer's alignment.
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
        // One that lies is damage where it is read.
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
        format!("its footer names none of the {left} bytes at {covered}: their rows are not read")
    }))
}

/// Memory that the library allocates for a message besides its bytes, by what its
/// buffers say.
fn claimed(header: &[u8], body: &[u8]) -> Result<u64, Broken> {
    let message = root_as_message(unprefixed(header)).map_err(damaged)?;
    let batch = match message.header_type() {
        MessageHeader::RecordBatch => message.header_as_record_batch(),
        MessageHeader::DictionaryBatch => message
            .header_as_dictionary_batch()
            .and_then(|dictionary| dictionary.data()),
        // The library refuses it.
        _ => return Ok(0),
    };
    let batch = batch.ok_or_else(|| damaged("a message has no batch"))?;
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
                "a buffer claims {length} bytes at {start}, of {} in its message",
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
            // As it is.
            Some(-1) => {}
            Some(claim) => all = all.saturating_add(size(claim)?),
            None => return Err(damaged("a compressed buffer has no length")),
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
