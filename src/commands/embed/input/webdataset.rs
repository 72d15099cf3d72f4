//! Reader of WebDataset: a tar in which the files with the same name, up to the
//! first dot, are one sample. Each image of a sample is a row.

mod names;

use std::borrow::Cow;
use std::ops::ControlFlow;
use std::sync::Arc;

use arrow_array::{ArrayRef, Int64Array, RecordBatch, StringArray};
use bytes::Bytes;

use self::names::{LinkTargets, MemberName, SampleIds, shown, split};
use super::archive::{Member, MemberKind, Members, StoredContent};
use super::sidecars::SidecarFault;
use super::{Broken, PlacedSample, Reading, Sample, Visitor, unfit};
use crate::client::pool::ImageFault;
use crate::commands::embed::memory::ImageRoom;
use crate::commands::embed::ranged::Ranged;
use crate::files::{IMAGES, UNREAD_IMAGES};
use crate::proto::GrpcCode;

/// Largest sidecar file that is kept: a caption or a label is never larger.
const SIDECAR_BYTES_MAX: u64 = 1 << 20;
/// Files of a sample that the error of a sample without an image lists.
const KINDS_SHOWN: usize = 8;
/// Bytes of the ids of a sample's images that wait for sidecar files: a sample
/// of a hundred thousand images.
const SAMPLE_NAMES_BYTES_MAX: usize = 16 << 20;

/// Sample whose files are being gathered.
#[derive(Debug, Default)]
struct Gathered {
    key: String,
    /// Name of the sample's first file.
    first: String,
    /// Offset at which the sample's first file begins.
    start: u64,
    /// Images so far, whether they were visited or not.
    n_images: u64,
    /// Images that wait for sidecar files, with their ids and cursors.
    images: Vec<(String, u64, GatheredImage)>,
    /// Bytes of the ids of images that wait or waited.
    names: usize,
    /// Bytes of the images of a compressed tar, which are held meanwhile.
    held: u64,
    /// Contents of the kept sidecar files, in the order of `--keep`.
    kept: Vec<Option<String>>,
    /// Faults of these files, in the same order.
    faults: Vec<Option<SidecarFault>>,
    kinds: Vec<String>,
}

/// Image of a sample.
#[derive(Debug)]
enum GatheredImage {
    Read(Result<Bytes, ImageFault>, Option<ImageRoom>),
    /// Image that is read once its sample is complete.
    There(StoredContent),
}

/// Kind of the sidecar files that hold class numbers.
const CLASS: &str = "cls";

/// Returns the class number that a sidecar file holds.
fn class_number(text: &str) -> Option<i64> {
    text.trim().parse().ok()
}

/// Makes the row of the kept columns. `cls` holds class numbers by WebDataset's
/// convention; every other column is text.
fn row(names: &[String], values: &[Option<String>]) -> Result<Option<RecordBatch>, Broken> {
    if names.is_empty() {
        return Ok(None);
    }
    let columns = names.iter().zip(values).map(|(name, value)| {
        let column: ArrayRef = if name == CLASS {
            let number = value.as_deref().and_then(class_number);
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

/// Reads a tar's samples; `cursor` is an offset in bytes of the tar, after
/// decompression. `id_base` stands before the ids, which the visitor adds. Every
/// run reads from the beginning, since ids, links and
/// global headers depend on what came before, but only from the cursor on are
/// images read and visited.
pub(super) fn read(
    file: &Ranged,
    id_base: &str,
    cursor: u64,
    reading: &Reading,
    visit: &mut Visitor<'_>,
) -> Result<(), Broken> {
    let mut samples = Samples {
        members: Members::new(file).map_err(|error| damaged(&error))?,
        id_base,
        cursor,
        reading,
        visit,
        ids: SampleIds::default(),
        targets: LinkTargets::default(),
        gathered: None,
    };
    loop {
        let member = match samples.members.next() {
            Ok(Some(member)) => member,
            Ok(None) => break,
            Err(error) => {
                let _ = samples.broken()?;
                return Err(damaged(&error));
            }
        };
        match samples.member(&member) {
            Ok(ControlFlow::Continue(())) => {}
            Ok(ControlFlow::Break(())) => return Ok(()),
            Err(broken) => {
                if matches!(broken, Broken::Damaged(_)) {
                    let _ = samples.broken()?;
                }
                return Err(broken);
            }
        }
    }
    let _ = samples.hand_over()?;
    Ok(())
}

/// True if a file that has another name is a tar, by its content.
pub(super) fn is_tar(file: &Ranged) -> bool {
    let first = Members::new(file).and_then(|mut members| members.next());
    first.is_ok_and(|member| member.is_some())
}

fn damaged(error: &std::io::Error) -> Broken {
    Broken::Damaged(format!("cannot read on in the tar: {error}"))
}

/// Reader of a shard's samples, with all that depends on what came before.
struct Samples<'a, 'v> {
    members: Members,
    id_base: &'a str,
    cursor: u64,
    reading: &'a Reading,
    visit: &'a mut Visitor<'v>,
    ids: SampleIds,
    targets: LinkTargets,
    gathered: Option<Gathered>,
}

impl Samples<'_, '_> {
    /// Adds a member to its sample.
    fn member(&mut self, member: &Member) -> Result<ControlFlow<()>, Broken> {
        if member.kind == MemberKind::Other {
            return Ok(ControlFlow::Continue(()));
        }
        let name = MemberName::new(&member.name);
        let Some((key, kind)) = split(&name.text) else {
            return Ok(ControlFlow::Continue(()));
        };
        if self.gathered.as_ref().is_none_or(|one| one.key != key) {
            if self.hand_over()?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
            self.gathered = Some(Gathered {
                key: key.to_owned(),
                first: name.text.clone(),
                start: member.begins,
                kept: vec![None; self.reading.keep.len()],
                faults: vec![None; self.reading.keep.len()],
                ..Gathered::default()
            });
        }
        let content = self.content(member);
        if let (Ok(content), true) = (&content, self.members.is_seekable()) {
            self.targets.insert(&member.name, content);
        }
        let content = match (name.fault, content) {
            (Some(fault), _) => Err(ImageFault::invalid(fault)),
            (None, content) => content,
        };
        let last = kind.rsplit('.').next().unwrap_or_default();
        let is_unread = UNREAD_IMAGES.contains(&last);
        if is_unread || IMAGES.contains(&last) {
            let content = if is_unread {
                Err(ImageFault::invalid(format!(
                    "a picture of the kind .{last} cannot be read; convert it to JPEG or PNG"
                )))
            } else {
                content
            };
            let key = (!is_unread).then_some(key);
            return self.image(key, &name.text, member.begins, content);
        }
        self.sidecar(kind, content)?;
        Ok(ControlFlow::Continue(()))
    }

    /// Finds the content of a member, which a link has from another.
    fn content(&self, member: &Member) -> Result<StoredContent, ImageFault> {
        if let Some(fault) = &member.fault {
            return Err(ImageFault {
                code: GrpcCode::DataLoss,
                message: fault.clone(),
            });
        }
        let (kind, target, found) = match &member.kind {
            MemberKind::File | MemberKind::Other => return Ok(member.content.clone()),
            MemberKind::HardLink(target) => ("hard", target, self.targets.hard(target)),
            MemberKind::SymbolicLink(target) => {
                let found = self.targets.symbolic(&member.name, target);
                ("symbolic", target, found)
            }
        };
        let why = if self.members.is_seekable() {
            "which is not among the files shortly before it in the tar; store the file itself"
        } else {
            "and links in a compressed tar are not followed; decompress it, or store the file itself"
        };
        found.cloned().ok_or_else(|| ImageFault {
            code: GrpcCode::FailedPrecondition,
            message: format!("it is a {kind} link to {}, {why}", shown(target)),
        })
    }

    /// Takes an image: to its visitor, or, if columns are kept, to its sample,
    /// whose sidecar files may come later.
    fn image(
        &mut self,
        key: Option<&str>,
        name: &str,
        begins: u64,
        content: Result<StoredContent, ImageFault>,
    ) -> Result<ControlFlow<()>, Broken> {
        let id = self.ids.give(key, name)?;
        let Some(one) = &mut self.gathered else {
            return Ok(ControlFlow::Continue(()));
        };
        // A sample begins with the first of its files.
        let cursor = if one.n_images == 0 { one.start } else { begins };
        one.n_images += 1;
        let wait = !self.reading.keep.is_empty();
        let is_seekable = self.members.is_seekable();
        let mut content = content
            .and_then(|content| unfit(content.size, 0, self.reading).map_or(Ok(content), Err));
        // Images before the cursor count too, so that every run finds the same.
        if wait {
            one.names += id.len();
            if one.names > SAMPLE_NAMES_BYTES_MAX {
                return Err(Broken::OverLimit(format!(
                    "the names of the images of the sample {} have over {SAMPLE_NAMES_BYTES_MAX} \
                     bytes, the limit with --keep",
                    one.key
                )));
            }
            if let Ok(there) = &content
                && !is_seekable
            {
                match over_together(there.size, one.held, self.reading) {
                    Some(fault) => content = Err(fault),
                    None => one.held += there.size,
                }
            }
        }
        if cursor < self.cursor {
            return Ok(ControlFlow::Continue(()));
        }
        let image = match content {
            Err(fault) => GatheredImage::Read(Err(of_image(fault)), None),
            Ok(content) if wait && is_seekable => GatheredImage::There(content),
            Ok(content) => {
                let (memory, runtime) = (&self.reading.memory, &self.reading.runtime);
                let room = memory.blocking_room(runtime, content.size);
                GatheredImage::Read(Ok(self.read(&content)?), room)
            }
        };
        if !wait {
            return self.visit(id, cursor, image, None);
        }
        if let Some(one) = &mut self.gathered {
            one.images.push((id, cursor, image));
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Reads the content of the member that was read last, or, for a link, of a
    /// member before it.
    fn read(&mut self, content: &StoredContent) -> Result<Bytes, Broken> {
        let read = if self.members.is_seekable() {
            self.members.read_again(content)
        } else {
            self.members.read(content)
        };
        read.map(Bytes::from).map_err(|error| damaged(&error))
    }

    fn sidecar(
        &mut self,
        kind: String,
        content: Result<StoredContent, ImageFault>,
    ) -> Result<(), Broken> {
        let place = self.reading.keep.iter().position(|name| *name == kind);
        if let Some(place) = place {
            let (content, fault) = match content {
                Err(_) => (None, Some(SidecarFault::Unread)),
                Ok(content) if content.size > SIDECAR_BYTES_MAX => {
                    (None, Some(SidecarFault::TooLarge))
                }
                Ok(content) => {
                    let (text, fault) = text_of(&kind, &self.read(&content)?);
                    (Some(text), fault)
                }
            };
            if let Some(one) = &mut self.gathered {
                // A file that cannot be kept leaves the one before it.
                if content.is_some() || one.kept[place].is_none() {
                    one.kept[place] = content;
                    one.faults[place] = fault;
                }
            }
        }
        if let Some(one) = &mut self.gathered
            && one.kinds.len() < KINDS_SHOWN
        {
            one.kinds.push(kind);
        }
        Ok(())
    }

    /// Visits what is left of the gathered sample: its images if columns are
    /// kept, or the fault of a sample without an image.
    fn hand_over(&mut self) -> Result<ControlFlow<()>, Broken> {
        let Some(one) = self.gathered.take() else {
            return Ok(ControlFlow::Continue(()));
        };
        let names = &self.reading.keep;
        if one.n_images == 0 {
            let id = self.ids.give(Some(&one.key), &one.first)?;
            if one.start < self.cursor {
                return Ok(ControlFlow::Continue(()));
            }
            let fault = ImageFault::invalid(format!(
                "image: the sample has no image; its files are {}",
                one.kinds.join(", ")
            ));
            let image = GatheredImage::Read(Err(fault), None);
            return self.visit(id, one.start, image, row(names, &one.kept)?);
        }
        if let Some((id, ..)) = one.images.first() {
            let faults = one.faults.iter().enumerate();
            for (place, fault) in faults.filter_map(|(place, fault)| Some((place, (*fault)?))) {
                let id = || format!("{}{id}", self.id_base);
                self.reading.sidecars.note_fault(place, fault, id);
            }
        }
        for (id, cursor, image) in one.images {
            let kept = row(names, &one.kept)?;
            if self.visit(id, cursor, image, kept)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Visits the images of a sample that the tar's damage has cut off, as
    /// errors: a row would lack the columns that came after it.
    fn broken(&mut self) -> Result<ControlFlow<()>, Broken> {
        let Some(one) = self.gathered.take() else {
            return Ok(ControlFlow::Continue(()));
        };
        for (id, cursor, _) in one.images {
            let fault = ImageFault {
                code: GrpcCode::DataLoss,
                message: "image: the tar is damaged before the end of this sample".to_owned(),
            };
            let image = GatheredImage::Read(Err(fault), None);
            if self
                .visit(id, cursor, image, row(&self.reading.keep, &one.kept)?)?
                .is_break()
            {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn visit(
        &mut self,
        id: String,
        cursor: u64,
        image: GatheredImage,
        kept: Option<RecordBatch>,
    ) -> Result<ControlFlow<()>, Broken> {
        let (image, room) = match image {
            GatheredImage::Read(image, room) => (image, room),
            GatheredImage::There(content) => {
                let (memory, runtime) = (&self.reading.memory, &self.reading.runtime);
                let room = memory.blocking_room(runtime, content.size);
                (Ok(self.read(&content)?), room)
            }
        };
        Ok((self.visit)(PlacedSample {
            cursor,
            share: self.members.share(),
            sample: Sample {
                id,
                image,
                room,
                kept,
            },
        }))
    }
}

/// Returns the text of a sidecar file, with its fault.
fn text_of(kind: &str, content: &[u8]) -> (String, Option<SidecarFault>) {
    let text = String::from_utf8_lossy(content);
    let fault = if kind == CLASS {
        class_number(&text)
            .is_none()
            .then_some(SidecarFault::NotWhole)
    } else {
        let is_same = matches!(text, Cow::Borrowed(_));
        (!is_same).then_some(SidecarFault::NotUtf8)
    };
    (text.into_owned(), fault)
}

/// Names the image as the part of the sample that has the fault.
fn of_image(fault: ImageFault) -> ImageFault {
    if fault.message.starts_with("image: ") {
        return fault;
    }
    ImageFault {
        message: format!("image: {}", fault.message),
        ..fault
    }
}

/// Returns the fault of an image that does not fit into memory beside the
/// sample's other images, `held` bytes, which wait for sidecar files.
fn over_together(bytes: u64, held: u64, reading: &Reading) -> Option<ImageFault> {
    let limit = reading.memory.limit();
    (bytes.saturating_add(held) > limit).then(|| ImageFault {
        code: GrpcCode::ResourceExhausted,
        message: format!(
            "image: {bytes} bytes, with {held} bytes of the sample's images before it, over the \
             limit of {limit} (--image-memory); decompress the tar, or leave --keep out"
        ),
    })
}

#[cfg(test)]
mod tests;
