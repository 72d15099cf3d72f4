//! Images that a table names and does not hold: those of a column of URLs, and
//! those of Hugging Face's images that have a path and no bytes.
//!
//! Rows that follow each other and name their images are read together, like
//! the files of a list. No image is waited for while a row that holds its image
//! is visited, since that row may need the memory of those read ahead.

use std::pin::Pin;
use std::sync::Arc;

use arrow_array::Array;
use arrow_array::cast::AsArray as _;
use arrow_schema::DataType;
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};

use super::Reading;
use super::files::{self, ListedRow, Listing, ReadFile};
use crate::client::pool::ImageFault;
use crate::commands::embed::location::{Location, scheme_of};
use crate::commands::embed::memory::ImageRoom;

/// Longest URL or path of a row. Servers refuse longer ones, and longer text is
/// no URL but an image or a caption.
const NAME_BYTES_MAX: usize = 8192;

/// True if a column of this type may hold URLs or paths.
pub(super) fn is_text(kind: &DataType) -> bool {
    matches!(
        kind,
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View
    )
}

fn text_at(column: &dyn Array, row: usize) -> Option<&str> {
    if column.is_null(row) {
        return None;
    }
    match column.data_type() {
        DataType::Utf8 => Some(column.as_string::<i32>().value(row)),
        DataType::LargeUtf8 => Some(column.as_string::<i64>().value(row)),
        DataType::Utf8View => Some(column.as_string_view().value(row)),
        _ => None,
    }
}

/// Image of a row, with the memory that it takes.
pub(super) type FetchedImage = (Result<Bytes, ImageFault>, Option<ImageRoom>);

/// Reader of the images that the rows of a batch name.
pub(super) struct ImagesElsewhere<'a> {
    column: &'a dyn Array,
    home: &'a Location,
    reading: &'a Reading,
    /// Cursor of the batch's first row.
    first: u64,
    /// Memory that the batch takes.
    held: u64,
    run: Option<Run<'a>>,
}

/// Rows that follow each other and are being read.
struct Run<'a> {
    end: usize,
    files: Pin<Box<dyn Stream<Item = ReadFile> + 'a>>,
}

impl<'a> ImagesElsewhere<'a> {
    /// Makes the reader of a batch's column of images or URLs, whose first row
    /// has the cursor `first`. Paths are relative to `table`.
    pub(super) fn new(
        column: &'a dyn Array,
        table: &'a Location,
        first: u64,
        held: u64,
        reading: &'a Reading,
    ) -> Self {
        Self {
            column,
            home: table,
            reading,
            first,
            held,
            run: None,
        }
    }

    /// Returns the image of the next row if the row names it; `None` if the row
    /// has to hold it. Fails when a store cannot be read.
    pub(super) fn next(&mut self, row: usize) -> anyhow::Result<Option<FetchedImage>> {
        if self.run.as_ref().is_none_or(|run| run.end <= row) {
            self.run = self.begin(row);
        }
        let Some(run) = &mut self.run else {
            return Ok(None);
        };
        let Some((_, room, image)) = self.reading.runtime.block_on(run.files.next()) else {
            anyhow::bail!("row {row} of the batch was not read");
        };
        Ok(Some((image?, room)))
    }

    /// Begins to read the rows from `row` on that name their images.
    fn begin(&self, row: usize) -> Option<Run<'a>> {
        let rows = (row..self.column.len()).map_while(|row| self.named(row));
        let rows: Vec<ListedRow> = rows.collect();
        if rows.is_empty() {
            return None;
        }
        let (end, held, reading) = (row + rows.len(), self.held, self.reading);
        let range = 0..rows.len();
        let first = self.first + row as u64;
        let listing = Arc::new(Listing::List {
            stores: Arc::clone(&reading.stores),
            base: self.home.parent(),
            rows,
        });
        Some(Run {
            end,
            files: Box::pin(files::of_rows(listing, range, first, held, reading)),
        })
    }

    /// Returns the name of a row's image; `None` if the row has to hold it.
    fn named(&self, row: usize) -> Option<ListedRow> {
        let name = match (&self.reading.url_column, self.column.data_type()) {
            (Some(flag), _) => match text_at(self.column, row).map(str::trim) {
                Some(name) if !name.is_empty() => name,
                _ => {
                    let why = format!("the row has no URL (--url-column {flag})");
                    return Some(listed(String::new(), Some(why)));
                }
            },
            (None, DataType::Struct(_)) if !self.column.is_null(row) => {
                let fields = self.column.as_struct();
                let bytes = fields.column_by_name("bytes")?;
                let path = fields.column_by_name("path")?;
                text_at(path.as_ref(), row).filter(|path| bytes.is_null(row) && !path.is_empty())?
            }
            _ => return None,
        };
        let is_local = name.starts_with('/') || scheme_of(name).as_deref() == Some("file");
        let trouble = if name.len() > NAME_BYTES_MAX {
            let bytes = name.len();
            let why = format!("the row's URL has {bytes} bytes; the limit is {NAME_BYTES_MAX}");
            return Some(listed(String::new(), Some(why)));
        } else if is_local && matches!(self.home, Location::Remote { .. }) {
            // A table of somebody else does not choose files of this machine.
            Some(format!(
                "{name} is a path of this machine, and the table is not on this machine; paths in \
                 such a table are relative to it"
            ))
        } else {
            None
        };
        Some(listed(name.to_owned(), trouble))
    }
}

fn listed(name: String, trouble: Option<String>) -> ListedRow {
    ListedRow {
        name,
        id: None,
        kept: Vec::new(),
        trouble: trouble.map(ImageFault::invalid),
    }
}

#[cfg(test)]
mod tests {
    use arrow_array::{ArrayRef, BinaryArray, LargeStringArray, StringArray, StructArray};
    use arrow_schema::Field;
    use object_store::memory::InMemory;
    use object_store::{ObjectStore, ObjectStoreExt as _};

    use super::*;
    use crate::commands::embed::input::tests::reading;

    /// Makes a table's place in a bucket that has the image `a.png`.
    async fn remote() -> Location {
        let store = InMemory::new();
        let path = object_store::path::Path::from("data/a.png");
        store.put(&path, "image".into()).await.unwrap();
        let store: Arc<dyn ObjectStore> = Arc::new(store);
        Location::Remote {
            store,
            path: object_store::path::Path::from("data/t.parquet"),
            url: "memory://bucket/data/t.parquet".to_owned(),
        }
    }

    /// Reads all rows of a column on a thread of its own; each is its bytes, its
    /// fault, or `held` if the row has to hold its image.
    async fn read(column: ArrayRef, home: Location, reading: Reading) -> Vec<String> {
        let read = move || {
            let mut images = ImagesElsewhere::new(column.as_ref(), &home, 0, 0, &reading);
            let rows = (0..column.len()).map(|row| match images.next(row).unwrap() {
                None => "held".to_owned(),
                Some((Ok(bytes), room)) => {
                    assert_eq!(room.unwrap().bytes(), bytes.len() as u64);
                    String::from_utf8(bytes.to_vec()).unwrap()
                }
                Some((Err(fault), room)) => {
                    assert!(room.is_none());
                    fault.message
                }
            });
            rows.collect()
        };
        tokio::task::spawn_blocking(read).await.unwrap()
    }

    #[tokio::test]
    async fn a_table_that_is_elsewhere_names_no_file_of_this_machine() {
        let dir = tempfile::tempdir().unwrap();
        let secret = dir.path().join("secret.png");
        std::fs::write(&secret, "secret").unwrap();
        let secret = secret.to_str().unwrap().to_owned();
        let names = [
            secret.clone(),
            format!("file://{secret}"),
            format!("FILE://{secret}"),
            format!("file:{secret}"),
            format!("File://localhost{secret}"),
            format!("../../../../../../../../../..{secret}"),
            "a.png".to_owned(),
        ];
        for column in [
            Arc::new(StringArray::from_iter_values(&names)) as ArrayRef,
            Arc::new(LargeStringArray::from_iter_values(&names)),
        ] {
            let mut reading = reading(&[]);
            reading.url_column = Some("url".to_owned());
            let got = read(column, remote().await, reading).await;
            for refused in &got[..5] {
                assert!(refused.contains("is a path of this machine"), "{refused}");
            }
            assert!(
                got[5].contains("has a part that is empty, . or .."),
                "{got:?}"
            );
            assert_eq!(got[6], "image");
        }
    }

    #[tokio::test]
    async fn rows_with_bytes_are_left_to_the_table() {
        let bytes = BinaryArray::from(vec![Some(&b"x"[..]), None, None, Some(b"y"), None]);
        let names = [Some("a.png"), Some("a.png"), None, None, Some("gone.png")];
        let field = |name, kind| Arc::new(Field::new(name, kind, true));
        let column = StructArray::from(vec![
            (
                field("path", DataType::Utf8),
                Arc::new(StringArray::from(names.to_vec())) as ArrayRef,
            ),
            (field("bytes", DataType::Binary), Arc::new(bytes)),
        ]);
        let got = read(Arc::new(column), remote().await, reading(&[])).await;
        assert_eq!(got[..4], ["held", "image", "held", "held"]);
        assert!(
            got[4].starts_with("image: gone.png: there is no such file"),
            "{got:?}"
        );
    }

    #[tokio::test]
    async fn an_image_has_the_memory_that_its_batch_leaves() {
        let column = StringArray::from(vec!["a.png"; 3]);
        let mut reading = reading(&[]);
        reading.url_column = Some("url".to_owned());
        let held = reading.memory.limit() - 4;
        let home = remote().await;
        let read = move || {
            let mut images = ImagesElsewhere::new(&column, &home, 0, held, &reading);
            let (image, room) = images.next(0).unwrap().unwrap();
            (image.unwrap_err().message, room.is_none())
        };
        let (message, is_free) = tokio::task::spawn_blocking(read).await.unwrap();
        assert!(message.contains("(--image-memory)"), "{message}");
        assert!(is_free);
    }
}
