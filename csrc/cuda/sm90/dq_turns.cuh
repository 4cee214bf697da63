// Whose turn it is to add to dQ, so that the sum has the same bits in every run.
//
// The key tiles that a query tile sees add to its dQ one after the other, from the last to the first; in the last section of a causal
// mask from the first to the last. The first to come stores, so that nothing has to be cleared, and the last converts. A word in
// global memory per query tile names the one that came last: its index + 1, and 0 is nobody. Two threads of a CTA look after it, so
// that the warpgroups wait for nothing but barriers of their own CTA:
//
//     awaits turns     reads the word until the key tile before has added                fills `turn`
//     warpgroups       wait for `turn`, add, empty it
//     passes them on   waits until `turn` is empty, writes the word                      frees the slot
//
// The reductions of the warpgroups happen before the word is written: they arrive at a barrier on which the writing thread
// waits, and its fence releases what it has observed to the whole device.
#pragma once

#include "../../core/params.h"
#include "../ptx/control.cuh"
#include "../ptx/global_memory.cuh"
#include "backward_launch.h"
#include "pipeline.cuh"
#include "steps.cuh"

namespace fae::sm90 {

constexpr int kNobody = -1;

// Where a key tile's walk over query tiles is: at query tile m, or if it goes from the last one to the first, at ~m. So positions
// ascend in either direction.
FAE_DEVICE int query_tile(int position, int flip) { return position ^ flip; }
FAE_DEVICE Range positions(const Range& m, int flip) { return flip == 0 ? m : Range{-m.end, -m.begin}; }

struct KeyTile {  // what a CTA works on; n = -1: there are no more
  int n;
  int b, h_kv;
  Range heads;  // of queries
  int split;
  int flip;       // 0, or -1: from the last query tile to the first; in turn only
  Range walk;     // positions: of this split
  Range full[2];  // positions at which a warpgroup's keys are seen by all rows: no mask there
};

// Of a key tile among those that add to dQ in turn, by positions of its walk.
struct Place {
  int first_until;  // before this one it is the first, nothing is there yet
  int last_from;    // from this one on it is the last, and dQ complete

  FAE_DEVICE bool is_first(int at) const { return at < first_until; }
  FAE_DEVICE bool is_last(int at) const { return at >= last_from; }
};

template <int kStages>
struct TurnBarriers {
  RingBarriers<kStages> turn;
  uint64_t free[kStages];

  FAE_DEVICE void init(int warps) {
    turn.init(warps);
    for (int i = 0; i < kStages; ++i) ptx::mbarrier_init(ptx::shared_address(&free[i]), 1);
  }
  FAE_DEVICE uint32_t free_address(int stage) const { return ptx::shared_address(&free[stage]); }

  FAE_DEVICE void await(const Ring<kStages>& at, const int* word, int before) const {
    ptx::mbarrier_wait(free_address(at.stage), at.parity ^ 1, "dq_turn_free");
    if (before != kNobody) ptx::wait_acquire(word, before + 1, "dq_turn_word");
    turn.fill(at.stage);
  }
  FAE_DEVICE bool is_done(const Ring<kStages>& at) const {
    return ptx::mbarrier_test_wait(turn.empty_address(at.stage), at.parity);
  }
  FAE_DEVICE void wait_done(const Ring<kStages>& at) const {
    ptx::mbarrier_wait(turn.empty_address(at.stage), at.parity, "dq_turn_done");
  }
  FAE_DEVICE void pass_on(int stage, int* word, int n) const {
    ptx::st_relaxed(word, n + 1);
    ptx::mbarrier_arrive(free_address(stage));
  }

  FAE_DEVICE void wait(const Ring<kStages>& at) const { turn.wait_full(at, "dq_turn"); }
  FAE_DEVICE void done(int stage) const { turn.release(stage); }
};

// For all query tiles of all key tiles: step(place in the ring, the query tile's word, key tile, whether that is the first), where
// start(work, buffer) returns the key tile's place.
template <typename Kernel, typename Start, typename Step>
FAE_DEVICE void for_each_turn(typename Kernel::Shared& shared, const Sizes& z, const BackwardLaunch& launch,
                              Start start, Step step) {
  Ring<Kernel::kKvBuffers> kv_at;
  Ring<Kernel::kStages> at;
  for (;; kv_at.advance()) {
    shared.kv_ring.wait_full(kv_at, "kv_full");
    const KeyTile work = shared.work[kv_at.stage];
    if (work.n < 0) break;
    const Place place = start(work, kv_at.stage);
    shared.kv_ring.release(kv_at.stage);
    int head = work.b * static_cast<int>(z.heads) + work.heads.begin;
    for (int h = work.heads.size(); h > 0; --h, ++head) {
      for (int i = work.walk.begin; i < work.walk.end; ++i) {
        step(at, launch.turns + int64_t{head} * launch.m_tiles + query_tile(i, work.flip), work, i, place.is_first(i));
        at.advance();
      }
    }
  }
}

// One thread of a CTA.
template <typename Kernel>
FAE_DEVICE void await_turns(typename Kernel::Shared& shared, const BackwardParams& p, const BackwardLaunch& launch) {
  constexpr int kM = Kernel::kM, kN = Kernel::kN;
  ptx::griddepcontrol_wait();  // the words are cleared before
  for_each_turn<Kernel>(
      shared, p.fwd.sizes, launch,
      [&](const KeyTile& work, int stage) {
        const int key = work.n * kN;
        const IntervalMask mask = p.fwd.mask(work.b);
        const Range later = query_tiles<kM>(mask, key + kN, key + 2 * kN);
        const int next_sees_from = later.empty() ? launch.m_tiles : later.begin;
        const int previous_sees_until = key == 0 ? 0 : query_tiles<kM>(mask, key - kN, key).end;
        const Place place =
            work.flip == 0 ? Place{next_sees_from, previous_sees_until} : Place{-previous_sees_until, -next_sees_from};
        shared.place[stage] = place;
        return place;
      },
      [&](const Ring<Kernel::kStages>& at, const int* word, const KeyTile& work, int, bool first) {
        shared.dq_turns.await(at, word, first ? kNobody : work.flip == 0 ? work.n + 1 : work.n - 1);
      });
}

// Another one.
template <typename Kernel>
FAE_DEVICE void pass_turns_on(typename Kernel::Shared& shared, const BackwardParams& p, const BackwardLaunch& launch) {
  bool held = false;
  for_each_turn<Kernel>(
      shared, p.fwd.sizes, launch, [](const KeyTile&, int) { return Place{}; },
      [&](const Ring<Kernel::kStages>& at, int* word, const KeyTile& work, int i, bool) {
        shared.dq_turns.wait_done(at);
        // The fence takes about as long as a step. So if the next turn of this walk is done as well, one does for both.
        Ring<Kernel::kStages> next = at;
        next.advance();
        if (!held && i + 1 < work.walk.end && shared.dq_turns.is_done(next)) {
          held = true;
          return;
        }
        ptx::fence_acq_rel_gpu();
        if (held)
          shared.dq_turns.pass_on(at.stage == 0 ? Kernel::kStages - 1 : at.stage - 1, word - 1 - 2 * work.flip, work.n);
        held = false;
        shared.dq_turns.pass_on(at.stage, word, work.n);
      });
}

}  // namespace fae::sm90
