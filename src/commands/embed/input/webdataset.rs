//! Reader of WebDataset: a tar in which the files with the same name, up to the
//! first dot, are one sample.

use std::io::Read as _;
use std::ops::ControlFlow;
use std::sync::Arc;

use arrow_array::{ArrayRef, Int64Array, RecordBatch, StringArray};
use bytes::Bytes;

use super::{Broken, PlacedSample, Reading, Sample, Visitor, unfit};
use crate::client::pool::ImageFault;
use crate::commands::embed::memory::ImageRoom;
use crate::commands::embed::ranged::Ranged;
use crate::files::IMAGES;

/// Size of a tar's blocks.
const BLOCK: u64 = 512;
/// Largest sidecar file that is kept: a caption or a label is never larger.
const SIDECAR_BYTES_MAX: u64 = 1 << 20;
/// Files of a sample that the error of a sample without an image lists.
const KINDS_SHOWN: usize = 8;

/// Sample whose files are being gathered.
#[derive(Debug, Default)]
struct Gathered {
    key: String,
    /// Offset at which the sample's first file begins.
    start: u64,
    image: Option<Result<Bytes, ImageFault>>,
    room: Option<ImageRoom>,
    /// Contents of the kept sidecar files, in the order of `--keep`.
    kept: Vec<Option<String>>,
    kinds: Vec<String>,
}

impl Gathered {
    fn sample(self, names: &[String]) -> Result<Sample, Broken> {
        let image = self.image.unwrap_or_else(|| {
            Err(ImageFault::invalid(format!(
                "image: the sample has no image; its files are {}",
                self.kinds.join(", ")
            )))
        });
        Ok(Sample {
            id: self.key,
            image,
            room: self.room,
            kept: row(names, &self.kept)?,
        })
    }
}

/// Makes the row of the kept columns. `cls` holds class numbers by WebDataset's
/// convention; every other column is text.
fn row(names: &[String], values: &[Option<String>]) -> Result<Option<RecordBatch>, Broken> {
    if names.is_empty() {
        return Ok(None);
    }
    let columns = names.iter().zip(values).map(|(name, value)| {
        let column: ArrayRef = if name == "cls" {
            let number = value.as_ref().and_then(|text| text.trim().parse().ok());
            Arc::new(Int64Array::from(vec![number]))
        } else {
            Arc::new(StringArray::from(vec![value.as_deref()]))
        };
        (name, column, true)
    });
    RecordBatch::try_from_iter_with_nullable(columns)
        .map(Some)
        .map_err(|error| Broken::Failed(error.into()))
}

/// Reads a tar's samples; `cursor` is an offset in bytes.
pub(super) fn read(
    file: &Ranged,
    cursor: u64,
    reading: &Reading,
    visit: &mut Visitor<'_>,
) -> Result<(), Broken> {
    let damaged =
        |error: std::io::Error| Broken::Damaged(format!("cannot read on in the tar: {error}"));
    let bytes = parquet::file::reader::Length::len(file);
    let mut hand_over = |gathered: Gathered| {
        Ok::<_, Broken>(visit(PlacedSample {
            cursor: gathered.start,
            #[expect(clippy::cast_precision_loss, reason = "a share for the eye")]
            share: gathered.start as f64 / bytes.max(1) as f64,
            sample: gathered.sample(&reading.keep)?,
        }))
    };
    let mut archive = tar::Archive::new(file.from(cursor));
    let mut gathered: Option<Gathered> = None;
    // End of the previous file, at which the next file with all its headers
    // begins.
    let mut start = cursor;
    for entry in archive.entries().map_err(damaged)? {
        let mut entry = entry.map_err(damaged)?;
        let begins = start;
        start = cursor + entry.raw_file_position() + entry.size().next_multiple_of(BLOCK);
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let name = name.trim_start_matches("./");
        let Some((key, kind)) = split(name) else {
            continue;
        };
        if gathered.as_ref().is_none_or(|one| one.key != key) {
            let next = Gathered {
                key: key.to_owned(),
                start: begins,
                kept: vec![None; reading.keep.len()],
                ..Gathered::default()
            };
            if let Some(whole) = gathered.replace(next)
                && hand_over(whole)? == ControlFlow::Break(())
            {
                return Ok(());
            }
        }
        let Some(one) = &mut gathered else { continue };
        if one.kinds.len() < KINDS_SHOWN {
            one.kinds.push(kind.clone());
        }
        let size = entry.size();
        let is_image = kind
            .rsplit('.')
            .next()
            .is_some_and(|last| IMAGES.contains(&last));
        if is_image && one.image.is_none() {
            one.image = Some(if let Some(fault) = unfit(size, 0, reading) {
                Err(fault)
            } else {
                one.room = reading.memory.blocking_room(&reading.runtime, size);
                Ok(content(&mut entry, size).map_err(damaged)?.into())
            });
        } else if let Some(place) = reading.keep.iter().position(|name| *name == kind)
            && size <= SIDECAR_BYTES_MAX
        {
            let content = content(&mut entry, size).map_err(damaged)?;
            one.kept[place] = Some(String::from_utf8_lossy(&content).into_owned());
        }
    }
    if let Some(whole) = gathered {
        let _ = hand_over(whole)?;
    }
    Ok(())
}

/// Reads a whole entry, whose `size` has been checked against a limit.
fn content(entry: &mut tar::Entry<'_, Ranged>, size: u64) -> std::io::Result<Vec<u8>> {
    let mut content = vec![0; usize::try_from(size).map_err(std::io::Error::other)?];
    entry.read_exact(&mut content)?;
    Ok(content)
}

/// Splits a file name: `a/b/000.seg.PNG` has the key `a/b/000` and the
/// extension `seg.png`.
fn split(name: &str) -> Option<(&str, String)> {
    let file = name.rfind('/').map_or(0, |slash| slash + 1);
    // A dotfile has no key.
    let point = file + name[file..].find('.').filter(|&at| at > 0)?;
    Some((&name[..point], name[point + 1..].to_ascii_lowercase()))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{local, read_all, reading};
    use super::*;
    use crate::commands::embed::plan::{Shard, ShardKind};

    #[test]
    fn keys_end_at_the_first_point_of_the_file() {
        assert_eq!(
            split("a.b/00.seg.PNG"),
            Some(("a.b/00", "seg.png".to_owned()))
        );
        assert_eq!(split("00"), None);
        assert_eq!(split("a/.hidden"), None);
    }

    fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, content) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, *content).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn shard(content: &[u8]) -> (tempfile::TempDir, Shard) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.tar");
        std::fs::write(&path, content).unwrap();
        let shard = Shard {
            name: "0.tar".to_owned(),
            bytes: content.len() as u64,
            id_base: String::new(),
            kind: ShardKind::WebDataset(local(&path)),
        };
        (dir, shard)
    }

    #[tokio::test]
    async fn every_cursor_begins_at_its_sample() {
        // Longer than the header's field, so the name has a header of its own.
        let long = format!("{}/3.jpg", "long".repeat(60));
        let content = tar(&[
            ("0.txt", b"none"),
            ("0.png", b"zero"),
            ("1.png", &[1; 700]),
            ("1.cls", b"7\n"),
            ("2.json", b"{}"),
            (&long, b"three"),
            ("4.png", &[4; 1001]),
        ]);
        let (_dir, shard) = shard(&content);
        let (all, result) = read_all(shard.clone(), 0, reading(&["cls", "txt"])).await;
        assert!(result.is_ok());
        let ids: Vec<&str> = all.iter().map(|(_, sample)| sample.id.as_str()).collect();
        assert_eq!(
            ids,
            ["0", "1", "2", long.strip_suffix(".jpg").unwrap(), "4"]
        );
        assert_eq!(all[0].1.image.as_deref(), Ok(&b"zero"[..]));
        assert_eq!(all[1].1.image.as_ref().unwrap().len(), 700);
        let message = |idx: usize| all[idx].1.image.as_ref().unwrap_err().message.as_str();
        assert_eq!(
            message(2),
            "image: the sample has no image; its files are json"
        );
        assert!(message(4).contains("1001 bytes, over the limit of 1000"));
        let kept = all[1].1.kept.as_ref().unwrap();
        let numbers = kept.column(0).as_any().downcast_ref::<Int64Array>();
        assert_eq!(numbers.unwrap().value(0), 7);
        for (n, (cursor, _)) in all.iter().enumerate() {
            let (rest, _) = read_all(shard.clone(), *cursor, reading(&[])).await;
            let rest: Vec<&str> = rest.iter().map(|(_, sample)| sample.id.as_str()).collect();
            assert_eq!(rest, ids[n..]);
        }
    }

    #[tokio::test]
    async fn a_tar_that_was_cut_off_is_damaged() {
        let mut content = tar(&[("0.png", b"zero"), ("1.png", &[1; 700])]);
        content.truncate(512 * 3 + 100);
        let (_dir, shard) = shard(&content);
        let (seen, result) = read_all(shard, 0, reading(&[])).await;
        assert!(matches!(result, Err(Broken::Damaged(_))), "{result:?}");
        // The second sample may have begun; only complete samples are visited.
        assert!(seen.len() <= 1);
    }
}
