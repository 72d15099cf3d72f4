//! Prefix sharing: finds the sequences of a step that begin alike, so that the
//! step reads that part of their key/value cache once for several of them.

use crate::kernels::attention::{BLOCK, SharedPrefix};
use crate::serve::sequence::{Past, Sequence};

/// For each slot, returns the slot with which it shares its first positions,
/// and their number. Equal pasts have equal keys and values, since these depend
/// on nothing else.
///
/// Sequences that are neighbors in the order of their tokens have the most in
/// common. Groups are therefore runs in that order, cut so that the most reads
/// are saved: positions that one sequence of a group reads for the others.
pub(super) fn prefixes(slots: &[Option<Sequence>]) -> Vec<SharedPrefix> {
    let mut prefixes: Vec<_> = (0..slots.len())
        .map(|of| SharedPrefix { of, len: 0 })
        .collect();
    let pasts = slots.iter().enumerate();
    let mut pasts: Vec<(Past<'_>, usize)> = pasts
        .filter_map(|(slot, sequence)| Some((sequence.as_ref()?.past()?, slot)))
        .collect();
    pasts.sort_unstable();
    // Positions that each past has in common with the one before it.
    let common: Vec<usize> = std::iter::once(0)
        .chain(pasts.windows(2).map(|pair| blocks(pair[0].0, pair[1].0)))
        .collect();
    let mut end = pasts.len();
    let cuts = cuts(&common);
    while end > 0 {
        let group = cuts[end].start..end;
        let len = common[group.start + 1..group.end].iter().min();
        let of = pasts[group.clone()].iter().map(|(_, slot)| *slot).min();
        if let (Some(&len), Some(of)) = (len, of) {
            let others = pasts[group.clone()].iter().filter(|(_, slot)| *slot != of);
            for (_, slot) in others {
                prefixes[*slot] = SharedPrefix { of, len };
            }
        }
        end = group.start;
    }
    prefixes
}

/// Number of positions that two pasts have in common, in whole blocks.
fn blocks(one: Past<'_>, other: Past<'_>) -> usize {
    if one.start != other.start {
        return 0;
    }
    let pairs = one.pixels.iter().zip(other.pixels);
    let n_same = 1 + pairs.take_while(|(one, other)| one == other).count();
    n_same / BLOCK * BLOCK
}

/// Best way to cut the first few pasts into groups.
#[derive(Clone, Copy)]
struct Cut {
    /// Index at which the last group starts.
    start: usize,
    /// Positions that need not be read.
    saved: usize,
}

/// Returns the best way to cut the first `n` pasts, for each `n` from 0 on.
fn cuts(common: &[usize]) -> Vec<Cut> {
    let mut cuts = vec![Cut { start: 0, saved: 0 }];
    for end in 1..=common.len() {
        let mut start = end - 1;
        let mut best = Cut {
            start,
            saved: cuts[start].saved,
        };
        let mut len = usize::MAX;
        while start > 0 && common[start] > 0 {
            len = len.min(common[start]);
            start -= 1;
            let saved = cuts[start].saved + (end - 1 - start) * len;
            if saved > best.saved {
                best = Cut { start, saved };
            }
        }
        cuts.push(best);
    }
    cuts
}
