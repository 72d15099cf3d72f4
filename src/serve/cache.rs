//! Cache of answers, if the operator turns it on.
//!
//! The key is the work itself, with all its tokens, and not a hash: two
//! pictures can never be taken for one another. A worker serves one model, so
//! the model is not in the key.

use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::sync::{Arc, LazyLock};

use moka::sync::Cache as Moka;

use crate::model::graph::Want;

/// Approximate size in bytes of an entry besides its tokens and numbers: the
/// key, two reference counts, the cache's own bookkeeping.
const ENTRY_OVERHEAD_BYTES: usize = 256;

/// Hasher with random keys per process, so that nobody can send images whose
/// hashes collide.
static HASHES: LazyLock<RandomState> = LazyLock::new(RandomState::new);

/// Key of work that has the same answer for every caller.
#[derive(Debug, Clone)]
pub(crate) struct AnswerKey {
    pub want: Want,
    /// Tokens as the model sees them, so the context is included.
    pub tokens: Arc<[u16]>,
    /// Hash of `want` and `tokens`, computed once since the tokens are long and
    /// the work is looked up several times on its way.
    hash: u64,
}

impl AnswerKey {
    #[must_use]
    pub(crate) fn new(want: Want, tokens: Arc<[u16]>) -> Self {
        let hash = HASHES.hash_one((want, &tokens));
        Self { want, tokens, hash }
    }
}

impl PartialEq for AnswerKey {
    fn eq(&self, other: &Self) -> bool {
        (self.hash, self.want) == (other.hash, other.want) && self.tokens == other.tokens
    }
}

impl Eq for AnswerKey {}

impl Hash for AnswerKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

/// Bounded cache of answers. Cheap to clone; with a size of 0 it keeps nothing.
#[derive(Debug, Clone)]
pub(crate) struct AnswerCache(Option<Moka<AnswerKey, Arc<[f32]>>>);

impl AnswerCache {
    /// Creates a cache of about `bytes_max` bytes; 0 turns the cache off.
    #[must_use]
    pub(crate) fn new(bytes_max: u64) -> Self {
        Self((bytes_max > 0).then(|| {
            Moka::builder()
                .max_capacity(bytes_max)
                .weigher(|key: &AnswerKey, values: &Arc<[f32]>| {
                    let bytes =
                        size_of_val(&*key.tokens) + size_of_val(&**values) + ENTRY_OVERHEAD_BYTES;
                    u32::try_from(bytes).unwrap_or(u32::MAX)
                })
                .build()
        }))
    }

    /// True if the cache keeps anything at all.
    #[must_use]
    pub(crate) fn is_on(&self) -> bool {
        self.0.is_some()
    }

    #[must_use]
    pub(crate) fn get(&self, key: &AnswerKey) -> Option<Arc<[f32]>> {
        self.0.as_ref()?.get(key)
    }

    pub(crate) fn put(&self, key: AnswerKey, values: &[f32]) {
        if let Some(cache) = &self.0 {
            cache.insert(key, values.into());
        }
    }

    /// Size of all entries in bytes.
    #[must_use]
    pub(crate) fn bytes(&self) -> u64 {
        self.0.as_ref().map_or(0, |cache| {
            cache.run_pending_tasks();
            cache.weighted_size()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(token: u16, want: Want) -> AnswerKey {
        AnswerKey::new(want, vec![token; 64].into())
    }

    #[test]
    fn an_answer_is_found_by_the_same_work_only() {
        let cache = AnswerCache::new(1 << 20);
        cache.put(key(1, Want::Mean), &[1.0]);
        assert_eq!(cache.get(&key(1, Want::Mean)).as_deref(), Some(&[1.0][..]));
        assert!(cache.get(&key(1, Want::Last)).is_none());
        assert!(cache.get(&key(2, Want::Mean)).is_none());
    }

    #[test]
    fn it_stays_within_its_size() {
        let cache = AnswerCache::new(10_000);
        for token in 0..1000 {
            cache.put(key(token, Want::Mean), &[0.0; 64]);
        }
        assert!(cache.bytes() <= 10_000 && cache.bytes() > 0);
    }

    #[test]
    fn without_a_size_it_keeps_nothing() {
        let cache = AnswerCache::new(0);
        cache.put(key(1, Want::Mean), &[1.0]);
        assert!(cache.get(&key(1, Want::Mean)).is_none());
        assert!(!cache.is_on());
    }
}
