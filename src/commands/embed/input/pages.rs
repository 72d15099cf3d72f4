//! Reader of Parquet, page by page: the sizes that a page's header claims are
//! checked before the library allocates them, and the pages that are held count
//! against `--image-memory`.
//!
//! The library reads a page's header through [`ChunkReader::get_read`], and
//! then the page's bytes through [`ChunkReader::get_bytes`], so both are
//! checked there. The library gets a page only if the decompressed page fits.

use std::collections::HashMap;
use std::io::Read;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arrow_array::RecordBatch;
use arrow_schema::{DataType, FieldRef, Fields, Schema};
use bytes::Bytes;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader, RowGroups, RowSelection,
    RowSelector,
};
use parquet::arrow::{ProjectionMask, parquet_to_arrow_field_levels};
use parquet::basic::{Compression, Encoding};
use parquet::column::page::{Page, PageIterator, PageMetadata, PageReader};
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::metadata::{ParquetMetaData, RowGroupMetaData};
use parquet::file::reader::{ChunkReader, Length};
use parquet::file::serialized_reader::SerializedPageReader;
use parquet::schema::types::SchemaDescriptor;

use super::{Broken, Reading};
use crate::commands::embed::memory::ImageRoom;
use crate::commands::embed::ranged::Ranged;

/// Largest number of rows that are decoded together if they hold images.
pub(super) const IMAGE_ROWS: u64 = 16;
/// Largest number of rows that are decoded together if they hold URLs. All
/// images of a batch are read before the next batch, so a batch has many times
/// the number of images that are read at the same time.
pub(super) const URL_ROWS: u64 = 1024;
/// Divisor of the memory that gives the limit of a batch of several rows; rows
/// that are larger are decoded one by one.
const BATCH_SHARES: u64 = 16;
/// Divisor of the memory that gives the limit of a footer: the structures that
/// are made from a footer are several times as large.
const FOOTER_SHARES: u64 = 16;
/// Size of a footer that is always accepted, whatever the memory: such a footer
/// has ten thousand columns and groups.
const FOOTER_BYTES_MIN: u64 = 1 << 20;
/// Memory for a value of a page or a dictionary: its levels, and its offset or
/// the number itself.
const VALUE_BYTES: u64 = 16;
/// Buffer through which a Brotli page is read when its size is checked.
const INFLATE_BYTES: usize = 8 << 10;
/// Largest page header in bytes. Older writers put the page's smallest and
/// largest value into it, which in a column of images are two images.
const HEADER_BYTES_MAX: u64 = 64 << 20;

fn damaged(error: impl std::fmt::Display) -> Broken {
    Broken::Damaged(error.to_string())
}

fn error(text: impl Into<String>) -> ParquetError {
    ParquetError::General(text.into())
}

/// Parquet file whose footer has been read.
pub(super) struct ParquetTable<'a> {
    file: &'a Ranged,
    reading: &'a Reading,
    metadata: ArrowReaderMetadata,
}

impl<'a> ParquetTable<'a> {
    pub(super) fn open(file: &'a Ranged, reading: &'a Reading) -> Result<Self, Broken> {
        let footer = footer_bytes(file)?;
        let limit = (reading.memory.limit() / FOOTER_SHARES).max(FOOTER_BYTES_MIN);
        if footer > limit {
            return Err(Broken::OverLimit(format!(
                "the footer takes {footer} bytes; the limit is {limit}, a sixteenth of \
                 --image-memory but at least {FOOTER_BYTES_MIN}"
            )));
        }
        let options = ArrowReaderOptions::new();
        let metadata = ArrowReaderMetadata::load(&file.from(0), options).map_err(damaged)?;
        Ok(Self {
            file,
            reading,
            metadata,
        })
    }

    pub(super) fn schema(&self) -> &Schema {
        self.metadata.schema()
    }

    pub(super) fn n_groups(&self) -> usize {
        self.metadata.metadata().num_row_groups()
    }

    /// Returns the number of rows that the file states, for the progress
    /// display.
    pub(super) fn n_rows(&self) -> u64 {
        let rows = self.metadata.metadata().file_metadata().num_rows();
        u64::try_from(rows).unwrap_or(0)
    }

    /// Returns the number of rows that a group claims.
    pub(super) fn rows(&self, group: usize) -> Result<u64, Broken> {
        let rows = self.metadata.metadata().row_group(group).num_rows();
        u64::try_from(rows).map_err(|_| damaged(format!("row group {group} claims {rows} rows")))
    }

    /// Hands on the batches of a group after its first `skipped` rows, each
    /// with the memory that the batch takes.
    pub(super) fn each(
        &self,
        group: usize,
        wanted: &Wanted<'_>,
        skipped: u64,
        mut visit: impl FnMut(&RecordBatch, u64) -> Result<ControlFlow<()>, Broken>,
    ) -> Result<ControlFlow<()>, Broken> {
        let metadata = Arc::clone(self.metadata.metadata());
        let schema = self.metadata.parquet_schema();
        let leaf = |name| wanted.viewed.and_then(|place| leaf_of(schema, place, name));
        let (viewed, path) = (leaf("bytes"), leaf("path"));
        let leaves = (0..schema.num_columns()).filter(|&leaf| {
            let root = schema.get_column_root_idx(leaf);
            let is_whole = wanted.viewed != Some(root);
            wanted.places.contains(&root) && (is_whole || [viewed, path].contains(&Some(leaf)))
        });
        let mask = ProjectionMask::leaves(schema, leaves);
        let batch_rows = self.batch_rows(group, &mask, wanted.batch_rows);
        let fields = with_views(self.schema(), wanted.viewed);
        let levels = parquet_to_arrow_field_levels(schema, mask, Some(&fields)).map_err(damaged)?;
        let held = Arc::new(Mutex::new(Held {
            reading: self.reading.clone(),
            pages: HashMap::new(),
            room: None,
            over_limit: None,
        }));
        let source = GroupPages {
            file: self.file.clone(),
            metadata,
            group,
            viewed,
            held: Arc::clone(&held),
        };
        let skipped = usize::try_from(skipped).map_err(damaged)?;
        let left = usize::try_from(self.rows(group)?).map_err(damaged)?;
        let selection = (skipped > 0).then(|| {
            RowSelection::from(vec![
                RowSelector::skip(skipped),
                RowSelector::select(left.saturating_sub(skipped)),
            ])
        });
        let of_error = |error: &dyn std::fmt::Display| match lock(&held).over_limit.take() {
            Some(why) => Broken::OverLimit(why),
            None => damaged(error),
        };
        let batches = ParquetRecordBatchReader::try_new_with_row_groups(
            &levels, &source, batch_rows, selection,
        )
        .map_err(|error| of_error(&error))?;
        for batch in batches {
            let batch = batch.map_err(|error| of_error(&error))?;
            // The compressed bytes of the last page are released here, and
            // images wait for the room that they had.
            let bytes = lock(&held).settle();
            if visit(&batch, bytes)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
            lock(&held).batch_is_done();
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Returns the number of rows per batch, small enough by the sizes that the
    /// group states. If a group states wrong sizes, its pages are refused.
    fn batch_rows(&self, group: usize, mask: &ProjectionMask, max: u64) -> usize {
        let group = self.metadata.metadata().row_group(group);
        let chunks = group.columns().iter().enumerate();
        let bytes = chunks
            .filter(|(leaf, _)| mask.leaf_included(*leaf))
            .map(|(_, chunk)| u64::try_from(chunk.uncompressed_size()).unwrap_or(u64::MAX))
            .fold(0_u64, u64::saturating_add);
        let rows = u64::try_from(group.num_rows()).unwrap_or(0).max(1);
        let budget = self.reading.memory.limit() / BATCH_SHARES;
        let fit = budget / (bytes / rows).max(1);
        usize::try_from(fit.clamp(1, max)).unwrap_or(1)
    }
}

/// Columns that are read.
pub(super) struct Wanted<'a> {
    pub(super) places: &'a [usize],
    /// Column of the images, if it is not also the id or a kept column. Its
    /// bytes are not copied out of their page, and of a struct only the bytes
    /// and the path are read.
    pub(super) viewed: Option<usize>,
    /// Largest number of rows of a batch.
    pub(super) batch_rows: u64,
}

/// Finds the leaf that holds the bytes, or the paths, of the images.
fn leaf_of(schema: &SchemaDescriptor, place: usize, name: &str) -> Option<usize> {
    (0..schema.num_columns()).find(|&leaf| {
        let column = schema.column(leaf);
        let path = column.path().parts();
        schema.get_column_root_idx(leaf) == place
            && ((path.len() == 1 && name == "bytes") || (path.len() == 2 && path[1] == name))
    })
}

/// Returns the fields of a table, with the bytes of the images as views.
fn with_views(schema: &Schema, viewed: Option<usize>) -> Fields {
    fn view(field: &FieldRef) -> FieldRef {
        match field.data_type() {
            DataType::Binary | DataType::LargeBinary => {
                let field = field.as_ref().clone();
                Arc::new(field.with_data_type(DataType::BinaryView))
            }
            _ => Arc::clone(field),
        }
    }
    let fields = schema.fields().iter().enumerate();
    fields
        .map(|(place, field)| match field.data_type() {
            _ if Some(place) != viewed => Arc::clone(field),
            DataType::Struct(inner) => {
                let inner = inner.iter().map(|field| {
                    if field.name() == "bytes" {
                        view(field)
                    } else {
                        Arc::clone(field)
                    }
                });
                let inner = DataType::Struct(inner.collect());
                Arc::new(field.as_ref().clone().with_data_type(inner))
            }
            _ => view(field),
        })
        .collect()
}

/// Returns the length that a file states for its footer.
fn footer_bytes(file: &Ranged) -> Result<u64, Broken> {
    let end = file.len().checked_sub(8);
    let end = end.ok_or_else(|| damaged("the file is too short for a footer"))?;
    let mut length = [0; 4];
    file.from(end).read_exact(&mut length).map_err(damaged)?;
    let length = u64::from(u32::from_le_bytes(length));
    if length > end {
        return Err(damaged(format!(
            "the footer claims {length} bytes; the file has {end} before its length"
        )));
    }
    Ok(length)
}

/// Pages of a row group that are held in memory.
struct Held {
    reading: Reading,
    /// Memory by leaf: of its dictionary, and of its data pages in this batch.
    pages: HashMap<usize, (u64, Vec<u64>)>,
    room: Option<ImageRoom>,
    /// Reason for which the library got an error instead of a page.
    over_limit: Option<String>,
}

fn lock(held: &Mutex<Held>) -> MutexGuard<'_, Held> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Held {
    fn bytes(&self) -> u64 {
        let pages = self.pages.values();
        pages.fold(0, |all, (dictionary, pages)| {
            pages
                .iter()
                .fold(all.saturating_add(*dictionary), |all, page| {
                    all.saturating_add(*page)
                })
        })
    }

    /// Drops all pages but the last of each column, with which the next batch
    /// continues.
    fn batch_is_done(&mut self) {
        for (_, pages) in self.pages.values_mut() {
            let done = pages.len().saturating_sub(1);
            pages.drain(..done);
        }
        self.settle();
    }

    /// Releases the room that the pages do not take, and returns the room that
    /// stays.
    fn settle(&mut self) -> u64 {
        let bytes = self.bytes();
        self.room.as_mut().map_or(0, |room| {
            room.shrink(bytes);
            room.bytes()
        })
    }

    /// Makes room for a page of a column, or fails with the reason for which
    /// there can be none.
    fn add(&mut self, column: &Column, page: &PageHeader) -> ParquetResult<()> {
        let transient = match column.compression {
            Compression::UNCOMPRESSED => 0,
            // The library reads through a buffer as large as the page.
            Compression::BROTLI(_) => page
                .compressed
                .saturating_add(page.uncompressed)
                .saturating_add(page.window),
            _ => page.compressed,
        };
        let mut kept = page.compressed.max(page.uncompressed);
        if !(column.is_viewed && page.is_plain) {
            // Values are copied out of the page; at most all of them are
            // copied.
            kept = kept.saturating_mul(2);
        }
        let kept = kept.saturating_add(page.values.saturating_mul(VALUE_BYTES));
        let of_leaf = self.pages.entry(column.leaf).or_default();
        if page.is_dictionary {
            of_leaf.0 = kept;
        } else {
            of_leaf.1.push(kept);
        }
        let all = self.bytes().saturating_add(transient);
        let limit = self.reading.memory.limit();
        if all > limit {
            let why = format!(
                "the pages of a batch take {all} bytes, over the limit of {limit} \
                 (--image-memory): the last page claims {} bytes, {} decompressed, and {} values",
                page.compressed, page.uncompressed, page.values
            );
            self.over_limit = Some(why.clone());
            return Err(error(why));
        }
        if self.room.as_ref().is_none_or(|room| room.bytes() < all) {
            // The room is released before a larger one is acquired: a reader
            // that holds one room and waits for another could wait for itself.
            self.room = None;
            let memory = &self.reading.memory;
            self.room = memory.blocking_room(&self.reading.runtime, all);
            if self.room.is_none() {
                return Err(error("the job has ended"));
            }
        }
        Ok(())
    }
}

/// Pages of one row group.
struct GroupPages {
    file: Ranged,
    metadata: Arc<ParquetMetaData>,
    group: usize,
    viewed: Option<usize>,
    held: Arc<Mutex<Held>>,
}

impl RowGroups for GroupPages {
    fn num_rows(&self) -> usize {
        let rows = self.metadata.row_group(self.group).num_rows();
        usize::try_from(rows).unwrap_or(0)
    }

    fn column_chunks(&self, leaf: usize) -> ParquetResult<Box<dyn PageIterator>> {
        let group = self.metadata.row_group(self.group);
        let columns = group.columns();
        let chunk = columns
            .get(leaf)
            .ok_or_else(|| error(format!("the row group has no column {leaf}")))?;
        // The same as `byte_range`, which would panic on wrong numbers.
        let start = chunk
            .dictionary_page_offset()
            .unwrap_or(chunk.data_page_offset());
        let end = start.checked_add(chunk.compressed_size());
        let bytes = i64::try_from(self.file.len()).unwrap_or(i64::MAX);
        if start < 0 || chunk.compressed_size() < 0 || end.is_none_or(|end| end > bytes) {
            return Err(error(format!(
                "column {leaf} claims {} bytes at offset {start}; the file has {bytes} bytes",
                chunk.compressed_size()
            )));
        }
        let descriptor = chunk.column_descr();
        let file = CheckedFile {
            file: self.file.clone(),
            column: Column {
                leaf,
                compression: chunk.compression(),
                is_viewed: self.viewed == Some(leaf),
            },
            held: Arc::clone(&self.held),
            headers: Mutex::default(),
        };
        let pages = SerializedPageReader::new(Arc::new(file), chunk, self.num_rows(), None)?;
        let pages: Box<dyn PageReader> = Box::new(CheckedPages {
            pages: Box::new(pages),
            repeats: descriptor.max_rep_level() > 0,
            is_optional: descriptor.max_def_level() > 0,
        });
        Ok(Box::new(OneChunk(Some(pages))))
    }

    fn row_groups(&self) -> Box<dyn Iterator<Item = &RowGroupMetaData> + '_> {
        Box::new(std::iter::once(self.metadata.row_group(self.group)))
    }

    fn metadata(&self) -> &ParquetMetaData {
        &self.metadata
    }
}

struct OneChunk(Option<Box<dyn PageReader>>);

impl Iterator for OneChunk {
    type Item = ParquetResult<Box<dyn PageReader>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.take().map(Ok)
    }
}

impl PageIterator for OneChunk {}

/// Facts about a column of a group.
struct Column {
    leaf: usize,
    compression: Compression,
    is_viewed: bool,
}

/// File as one column reads it, with its pages' headers checked.
struct CheckedFile {
    file: Ranged,
    column: Column,
    held: Arc<Mutex<Held>>,
    headers: Mutex<Headers>,
}

/// Headers that were read last, with the offsets at which their pages begin. A
/// dictionary that was skipped may be requested later.
#[derive(Default)]
struct Headers {
    dictionary: Option<(u64, PageHeader)>,
    last: Option<(u64, PageHeader)>,
    /// Header of the last page without bytes, such as the dictionary of a
    /// column without values. The next page's header begins where this page
    /// does.
    empty: Option<(u64, PageHeader)>,
}

impl Headers {
    /// Returns the headers of the pages that begin at an offset.
    fn of(&self, start: u64) -> impl Iterator<Item = PageHeader> + use<> {
        let known = [self.last, self.dictionary, self.empty];
        let known = known.into_iter().flatten();
        known
            .filter(move |(at, _)| *at == start)
            .map(|(_, header)| header)
    }
}

impl Length for CheckedFile {
    fn len(&self) -> u64 {
        self.file.len()
    }
}

impl ChunkReader for CheckedFile {
    type T = Ranged;

    fn get_read(&self, start: u64) -> ParquetResult<Ranged> {
        let mut headers = self.headers.lock().unwrap_or_else(PoisonError::into_inner);
        // After a header was read on its own, the library requests the page at
        // the header's end.
        if headers.of(start).all(|header| header.compressed == 0) {
            match PageHeader::read(self.file.from(start)) {
                Ok(header) => {
                    let known = Some((start.saturating_add(header.length), header));
                    if header.is_dictionary {
                        headers.dictionary = known;
                    }
                    if header.compressed == 0 {
                        headers.empty = known;
                    }
                    headers.last = known;
                }
                // A page without bytes may be the last one of its column.
                Err(_) if headers.of(start).next().is_some() => {}
                Err(error) => return Err(error),
            }
        }
        self.file.get_read(start)
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        let headers = self.headers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut known = headers.of(start).peekable();
        drop(headers);
        if known.peek().is_none() {
            return Err(error("a page has no header"));
        }
        let header = known.find(|header| header.compressed == length as u64);
        let mut header = header.ok_or_else(|| {
            error("a page is requested with another length than its header states")
        })?;
        if matches!(self.column.compression, Compression::BROTLI(_)) && length > 0 {
            header.window = brotli_window(self.file.get_bytes(start, 1)?[0])?;
        }
        lock(&self.held).add(&self.column, &header)?;
        let bytes = self.file.get_bytes(start, length)?;
        inflates_to(&bytes, header.uncompressed, self.column.compression)?;
        Ok(bytes)
    }
}

/// Checks that a page decompresses to no more than its header claims, for the
/// formats that the library reads to their end whatever the claim is.
fn inflates_to(page: &[u8], claim: u64, compression: Compression) -> ParquetResult<()> {
    let one_more = claim.saturating_add(1);
    let inflated = match compression {
        Compression::GZIP(_) => {
            let inflater = flate2::read::MultiGzDecoder::new(page);
            std::io::copy(&mut inflater.take(one_more), &mut std::io::sink())
        }
        // The format has blocks with their lengths; the library falls back to
        // frames.
        Compression::LZ4 => {
            let inflater = lz4_flex::frame::FrameDecoder::new(page);
            std::io::copy(&mut inflater.take(one_more), &mut std::io::sink())
        }
        Compression::BROTLI(_) => {
            let inflater = brotli::Decompressor::new(page, INFLATE_BYTES);
            std::io::copy(&mut inflater.take(one_more), &mut std::io::sink())
        }
        _ => return Ok(()),
    };
    // A page that cannot be decompressed is reported by the library.
    if inflated.is_ok_and(|bytes| bytes > claim) {
        return Err(error(format!(
            "a page is larger than the {claim} bytes that its header claims"
        )));
    }
    Ok(())
}

/// Returns the memory of the window that a Brotli stream claims in its first
/// byte: 1 KiB to 16 MiB (RFC 7932, section 9.1). The windows of up to 1 GiB
/// that some encoders can write are no part of the format, and are refused.
fn brotli_window(first: u8) -> ParquetResult<u64> {
    let bits = match (first & 1, (first >> 1) & 7, (first >> 4) & 7) {
        (0, ..) => 16,
        (_, 0, 0) => 17,
        (_, 0, 1) => return Err(error("a page claims a Brotli window of over 16 MiB")),
        (_, 0, more) => 8 + more,
        (_, more, _) => 17 + more,
    };
    Ok(1 << bits)
}

/// Facts that a page's header states.
#[derive(Debug, Clone, Copy, Default)]
struct PageHeader {
    /// Length of the header itself.
    length: u64,
    compressed: u64,
    uncompressed: u64,
    values: u64,
    /// Memory of the window that a Brotli page is decompressed with.
    window: u64,
    is_dictionary: bool,
    /// True if the values stand in the page one after the other, or are indexes
    /// into a dictionary.
    is_plain: bool,
}

impl PageHeader {
    fn read(file: Ranged) -> ParquetResult<Self> {
        let mut header = Thrift {
            file: std::io::BufReader::with_capacity(1 << 10, file),
            read: 0,
        };
        let mut page = Self::default();
        header.each_field(0, &mut |thrift, field, kind, depth| {
            match (depth, field, kind) {
                (0, 1, I32) => page.is_dictionary = thrift.integer()? == 2,
                (0, 2, I32) => page.uncompressed = size(thrift.integer()?)?,
                (0, 3, I32) => page.compressed = size(thrift.integer()?)?,
                // Each kind of page has a header of its own, which begins with
                // the number of values and contains the encoding.
                (0, kind @ (5 | 7 | 8), STRUCT) => {
                    let encoding = if kind == 8 { 4 } else { 2 };
                    thrift.each_field(1, &mut |thrift, field, kind, _| {
                        match (field, kind) {
                            (1, I32) => page.values = size(thrift.integer()?)?,
                            (field, I32) if field == encoding => {
                                page.is_plain = matches!(thrift.integer()?, 0 | 2 | 8);
                            }
                            _ => return Ok(false),
                        }
                        Ok(true)
                    })?;
                }
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        page.length = header.read;
        Ok(page)
    }
}

fn size(claimed: i64) -> ParquetResult<u64> {
    u64::try_from(claimed).map_err(|_| error(format!("a page claims a size of {claimed}")))
}

/// Type codes of a field in Thrift's compact protocol.
const TRUE: u8 = 1;
const FALSE: u8 = 2;
const BYTE: u8 = 3;
const I16: u8 = 4;
const I32: u8 = 5;
const I64: u8 = 6;
const DOUBLE: u8 = 7;
const BINARY: u8 = 8;
const STRUCT: u8 = 12;
/// Nesting of structs; a page's header has two levels.
const DEPTH_MAX: usize = 8;

/// Reader of as much of Thrift as a page's header needs: numbers are read, all
/// other fields are skipped.
struct Thrift {
    file: std::io::BufReader<Ranged>,
    read: u64,
}

type Field<'a> = dyn FnMut(&mut Thrift, i64, u8, usize) -> ParquetResult<bool> + 'a;

impl Thrift {
    fn byte(&mut self) -> ParquetResult<u8> {
        if self.read >= HEADER_BYTES_MAX {
            return Err(error(format!(
                "a page's header has over {HEADER_BYTES_MAX} bytes, the limit"
            )));
        }
        let mut byte = [0];
        self.file.read_exact(&mut byte)?;
        self.read += 1;
        Ok(byte[0])
    }

    fn varint(&mut self) -> ParquetResult<u64> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(error("a page's header has an unterminated number"))
    }

    fn integer(&mut self) -> ParquetResult<i64> {
        let zigzag = self.varint()?;
        Ok((zigzag >> 1).cast_signed() ^ -(zigzag & 1).cast_signed())
    }

    /// Calls `field` for each field. A field for which it returns `false`,
    /// since it has not read the field, is skipped.
    fn each_field(&mut self, depth: usize, field: &mut Field<'_>) -> ParquetResult<()> {
        if depth > DEPTH_MAX {
            return Err(error("a page's header is nested too deeply"));
        }
        let mut number = 0_i64;
        loop {
            let byte = self.byte()?;
            let kind = byte & 0x0f;
            if kind == 0 {
                return Ok(());
            }
            number = match byte >> 4 {
                0 => self.integer()?,
                step => number.wrapping_add(step.into()),
            };
            if !field(self, number, kind, depth)? {
                self.skip(kind, depth)?;
            }
        }
    }

    fn skip(&mut self, kind: u8, depth: usize) -> ParquetResult<()> {
        match kind {
            TRUE | FALSE => {}
            BYTE => drop(self.byte()?),
            I16 | I32 | I64 => drop(self.varint()?),
            DOUBLE => {
                for _ in 0..8 {
                    self.byte()?;
                }
            }
            BINARY => {
                for _ in 0..self.varint()? {
                    self.byte()?;
                }
            }
            STRUCT => self.each_field(depth + 1, &mut |_, _, _, _| Ok(false))?,
            _ => return Err(error("a page's header has an unexpected list")),
        }
        Ok(())
    }
}

/// Pages whose claims about their values are checked once they are
/// decompressed.
struct CheckedPages {
    pages: Box<SerializedPageReader<CheckedFile>>,
    repeats: bool,
    is_optional: bool,
}

impl CheckedPages {
    fn check(&self, page: &Page) -> ParquetResult<()> {
        let (Page::DataPage { .. } | Page::DataPageV2 { .. }) = page else {
            return Ok(());
        };
        let lengths = match page.encoding() {
            Encoding::DELTA_LENGTH_BYTE_ARRAY | Encoding::DELTA_BINARY_PACKED => 1,
            Encoding::DELTA_BYTE_ARRAY => 2,
            _ => return Ok(()),
        };
        let mut values = self.values(page)?;
        for _ in 0..lengths {
            let deltas =
                deltas(&mut values).ok_or_else(|| error("a page's lengths are damaged"))?;
            if deltas > u64::from(page.num_values()) {
                return Err(error(format!(
                    "a page of {} values claims {deltas} lengths",
                    page.num_values()
                )));
            }
        }
        Ok(())
    }

    /// Returns the part of a page after its levels.
    fn values<'p>(&self, page: &'p Page) -> ParquetResult<&'p [u8]> {
        let short = || error("a page ends within its levels");
        let bytes: &[u8] = page.buffer();
        if let Page::DataPageV2 {
            def_levels_byte_len,
            rep_levels_byte_len,
            ..
        } = page
        {
            let levels = u64::from(*def_levels_byte_len) + u64::from(*rep_levels_byte_len);
            let levels = usize::try_from(levels).map_err(|_| short())?;
            return bytes.get(levels..).ok_or_else(short);
        }
        let mut left = bytes;
        for _ in 0..usize::from(self.repeats) + usize::from(self.is_optional) {
            let (length, rest) = left.split_first_chunk().ok_or_else(short)?;
            let length = usize::try_from(u32::from_le_bytes(*length)).map_err(|_| short())?;
            left = rest.get(length..).ok_or_else(short)?;
        }
        Ok(left)
    }
}

/// Returns the number of values that a run of deltas claims, and advances
/// `bytes` to the end of the run.
fn deltas(bytes: &mut &[u8]) -> Option<u64> {
    fn varint(bytes: &mut &[u8]) -> Option<u64> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = bytes.split_first()?;
            *bytes = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }
    let block = varint(bytes)?;
    let miniblocks = varint(bytes)?;
    let values = varint(bytes)?;
    varint(bytes)?;
    let of_miniblock = block.checked_div(miniblocks)?;
    if of_miniblock == 0 {
        return None;
    }
    // The first value stands in the head.
    let mut left = values.saturating_sub(1);
    while left > 0 {
        varint(bytes)?;
        let (widths, rest) = bytes.split_at_checked(usize::try_from(miniblocks).ok()?)?;
        *bytes = rest;
        for &width in widths {
            if left == 0 {
                break;
            }
            let length = of_miniblock.checked_mul(width.into())? / 8;
            *bytes = bytes.get(usize::try_from(length).ok()?..)?;
            left = left.saturating_sub(of_miniblock);
        }
    }
    Some(values)
}

impl Iterator for CheckedPages {
    type Item = ParquetResult<Page>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

impl PageReader for CheckedPages {
    fn get_next_page(&mut self) -> ParquetResult<Option<Page>> {
        let page = self.pages.get_next_page()?;
        if let Some(page) = &page {
            self.check(page)?;
        }
        Ok(page)
    }

    fn peek_next_page(&mut self) -> ParquetResult<Option<PageMetadata>> {
        self.pages.peek_next_page()
    }

    fn skip_next_page(&mut self) -> ParquetResult<()> {
        self.pages.skip_next_page()
    }

    fn supports_deferred_dictionary(&self) -> bool {
        self.pages.supports_deferred_dictionary()
    }

    fn take_deferred_dictionary(&mut self) -> ParquetResult<Option<Page>> {
        self.pages.take_deferred_dictionary()
    }

    fn at_record_boundary(&mut self) -> ParquetResult<bool> {
        self.pages.at_record_boundary()
    }
}
