//! Record of the files beside the images of tars (`--keep`): kinds that no
//! sample has, and files whose content cannot be kept as it is.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use arrow_array::{Array as _, RecordBatch};

/// Way in which the value of a kept column differs from its sidecar file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum SidecarFault {
    /// A class number that is none, which becomes null.
    NotWhole,
    /// Text with bytes that are replaced.
    NotUtf8,
    /// File over the limit, which becomes null.
    TooLarge,
    /// File without content of its own, which becomes null: a link that cannot
    /// be followed, or a name that is no text.
    Unread,
}

impl SidecarFault {
    /// Says what is wrong with the file, and what the table has.
    fn describe(self) -> (&'static str, &'static str) {
        match self {
            Self::NotWhole => ("is not a whole number in 64 bits", "the value is null"),
            Self::NotUtf8 => ("is not UTF-8", "U+FFFD replaces what cannot be read"),
            Self::TooLarge => ("has over 1 MiB", "the value is null"),
            Self::Unread => (
                "cannot be read (a link without its target, or a name that is not UTF-8)",
                "the value is null",
            ),
        }
    }
}

/// Number of samples with one fault of one column, and the id of the first.
#[derive(Debug)]
struct FaultySamples {
    number: u64,
    first: String,
}

/// Record of the kinds of files beside images that samples of tars had: a kind
/// that none of them has is probably mistyped.
#[derive(Debug, Default)]
pub(in crate::commands::embed) struct SidecarsSeen {
    samples: AtomicU64,
    places: Mutex<BTreeSet<usize>>,
    /// At most as many as there are kept columns and faults.
    faults: Mutex<BTreeMap<(usize, SidecarFault), FaultySamples>>,
}

impl SidecarsSeen {
    pub(super) fn note(&self, kept: Option<&RecordBatch>) {
        let Some(kept) = kept else { return };
        self.samples.fetch_add(1, Ordering::Relaxed);
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        if places.len() < kept.num_columns() {
            let has_value = |&place: &usize| kept.column(place).null_count() == 0;
            places.extend((0..kept.num_columns()).filter(has_value));
        }
    }

    /// Counts a sample with the id `id`, whose sidecar file of the column
    /// `place` has a fault.
    pub(super) fn note_fault(
        &self,
        place: usize,
        fault: SidecarFault,
        id: impl FnOnce() -> String,
    ) {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        places.insert(place);
        drop(places);
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        let samples = faults
            .entry((place, fault))
            .or_insert_with(|| FaultySamples {
                number: 0,
                first: id(),
            });
        samples.number += 1;
    }

    /// Returns what is to be said about the columns `keep` at the end of the
    /// job: those that no sample had, and files that were not kept as they are.
    pub(in crate::commands::embed) fn warnings(&self, keep: &[String]) -> Vec<String> {
        let name = |place: usize| keep.get(place).map_or("", String::as_str);
        let mut warnings = Vec::new();
        if self.samples.load(Ordering::Relaxed) > 0 {
            let places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
            let missing = (0..keep.len()).filter(|place| !places.contains(place));
            warnings.extend(missing.map(|place| {
                format!(
                    "--keep {}: none of the tars' samples that were read has a file of this kind, \
                     so the column is empty",
                    name(place)
                )
            }));
        }
        let faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        warnings.extend(faults.iter().map(|((place, fault), samples)| {
            let (what, effect) = fault.describe();
            format!(
                "--keep {}: the file of this kind {what} in {} of the tars' samples that were \
                 read, so {effect}; the first is {}",
                name(*place),
                samples.number,
                samples.first
            )
        }));
        warnings
    }
}
