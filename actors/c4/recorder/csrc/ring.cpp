// One ring operation without Python's lock: the compiled form of engine.py, which says what it does and why.
// A plain C interface (called through ctypes, which releases the lock); no torch. Every error is a code: engine.py's sentences say it.

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#include <algorithm>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

namespace {

constexpr uint32_t kAnnounce = 0x43344101, kPiece = 0x43344102, kAbort = 0x43344103;
constexpr int kPacingRate = 47;  // SO_MAX_PACING_RATE
constexpr int kStallPollMs = 20;
constexpr size_t kAbortBytes = 600;
constexpr size_t kSlice = 128 << 10;  // of a piece that is added: stays in the cache between receiving and adding
constexpr int64_t kTurn = 1 << 20;    // bytes after which the other direction gets its turn

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

// ---- adding: own = incoming + own, elementwise, so the same bits on every instruction set

template <class T>
inline void add_plain(T* own, const T* in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) own[i] = in[i] + own[i];
}
CLONES void add_f32(float* own, const float* in, int64_t n) { add_plain(own, in, n); }
CLONES void add_f64(double* own, const double* in, int64_t n) { add_plain(own, in, n); }
CLONES void add_u8(uint8_t* own, const uint8_t* in, int64_t n) { add_plain(own, in, n); }
CLONES void add_u16(uint16_t* own, const uint16_t* in, int64_t n) { add_plain(own, in, n); }
CLONES void add_u32(uint32_t* own, const uint32_t* in, int64_t n) { add_plain(own, in, n); }
CLONES void add_u64(uint64_t* own, const uint64_t* in, int64_t n) { add_plain(own, in, n); }

inline float from_bf16(uint16_t bits) {
  uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline uint16_t to_bf16(float value) {  // round to nearest even, as torch does
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  uint32_t rounded = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16;
  return value != value ? 0x7FC0 : uint16_t(rounded);
}
CLONES void add_bf16(uint16_t* own, const uint16_t* in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) own[i] = to_bf16(from_bf16(in[i]) + from_bf16(own[i]));
}
CLONES void divide_bf16(uint16_t* own, float by, int64_t n) {
  for (int64_t i = 0; i < n; ++i) own[i] = to_bf16(from_bf16(own[i]) / by);
}
CLONES void divide_f32(float* own, float by, int64_t n) {
  for (int64_t i = 0; i < n; ++i) own[i] /= by;
}
CLONES void divide_f64(double* own, double by, int64_t n) {
  for (int64_t i = 0; i < n; ++i) own[i] /= by;
}
#ifdef __FLT16_MAX__
CLONES void add_f16(_Float16* own, const _Float16* in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) own[i] = _Float16(float(in[i]) + float(own[i]));
}
CLONES void divide_f16(_Float16* own, float by, int64_t n) {
  for (int64_t i = 0; i < n; ++i) own[i] = _Float16(float(own[i]) / by);
}
#endif

struct Piece {  // plan.PIECE
  int64_t offset, length;
  int32_t start, accumulate, hops, reserved;
};
struct Edge {  // records.EDGE_RECORD
  int64_t op_id, sequence, bytes, lateness_ns, wait_ns, transfer_ns, progress_ns;
  int32_t communicator, source, destination, messages;
};
static_assert(sizeof(Piece) == 32 && sizeof(Edge) == 72);
struct Frame {
  uint32_t kind, piece, hop, length;
};
struct Order {
  uint32_t piece, hop;
};

// Another process reads these words: written whole.
template <class T>
void put(T& place, T value) {
  __atomic_store_n(&place, value, __ATOMIC_RELAXED);
}

enum Status : int32_t { kDone, kMismatch, kLostPredecessor, kLostSuccessor, kTold, kTimeout, kProtocol, kInterrupted };

}  // namespace

extern "C" {

struct Job {  // native.py: _Job
  int32_t out_fd, in_fd, rank, size;
  int32_t element_type, average, piece_count, reserved;
  int64_t receives, sends, begun_ns, deadline_ns, pacing;
  uint8_t* data;
  const Piece* pieces;
  Edge *out_edge, *in_edge;
  const int64_t* control;  // 0 free, -1 stalled, else bytes a second
  uint8_t announcement[24];
};

struct Outcome {  // native.py: _Outcome
  int32_t error, announced;
  int64_t awaited, unsent;
  const uint8_t* rest_head;
  const uint8_t* rest_body;
  int64_t rest_head_bytes, rest_body_bytes;
  int32_t text_bytes, reserved;
  uint8_t announcement[24];
  uint8_t text[600];
};

struct Ring {
  Job job;
  Outcome* out;
  // sending
  std::vector<Order> queue;
  size_t queue_at;
  bool held;  // the next of the queue has been counted as begun
  uint8_t head[sizeof(Frame) + 24];
  size_t head_at, head_end;
  const uint8_t* body;
  int64_t body_left;
  // receiving
  Frame frame;
  uint8_t small[kAbortBytes];
  bool in_body;
  size_t frame_have;
  int64_t body_have;   // bytes of the body taken so far
  int64_t slice_have;  // of them in ``slice`` and not yet added
  int64_t ready_ns, first_ns, adding_ns;
  std::vector<uint8_t> slice;
  int64_t rate = 0;
  bool successor_left = false;  // for good, and in order: it had all that it needed
};

Ring* c4_ring_new() { return new Ring(); }
void c4_ring_delete(Ring* ring) { delete ring; }
}

namespace {

void add(Ring& r, uint8_t* own, const uint8_t* in, int64_t bytes) {
  switch (r.job.element_type) {  // records.ElementType
    case 1: return add_f32((float*)own, (const float*)in, bytes / 4);
    case 2: return add_f64((double*)own, (const double*)in, bytes / 8);
#ifdef __FLT16_MAX__
    case 3: return add_f16((_Float16*)own, (const _Float16*)in, bytes / 2);
#endif
    case 4: return add_bf16((uint16_t*)own, (const uint16_t*)in, bytes / 2);
    case 5: case 6: return add_u8(own, in, bytes);
    case 7: return add_u16((uint16_t*)own, (const uint16_t*)in, bytes / 2);
    case 8: return add_u32((uint32_t*)own, (const uint32_t*)in, bytes / 4);
    case 9: return add_u64((uint64_t*)own, (const uint64_t*)in, bytes / 8);
  }
}

void divide(Ring& r, uint8_t* own, int64_t bytes) {
  switch (r.job.element_type) {
    case 1: return divide_f32((float*)own, float(r.job.size), bytes / 4);
    case 2: return divide_f64((double*)own, double(r.job.size), bytes / 8);
#ifdef __FLT16_MAX__
    case 3: return divide_f16((_Float16*)own, float(r.job.size), bytes / 2);
#endif
    case 4: return divide_bf16((uint16_t*)own, float(r.job.size), bytes / 2);
  }
}

int64_t width(int type) {
  static const int64_t bytes[] = {1, 4, 8, 2, 2, 1, 1, 2, 4, 8, 1, 1};
  return bytes[type];
}

bool flows(Ring& r) {
  int64_t word = __atomic_load_n(r.job.control, __ATOMIC_RELAXED);
  if (word == -1) return false;
  int64_t wanted = word ? word : r.job.pacing;
  if (wanted != r.rate) {
    uint32_t rate = wanted ? uint32_t(std::min<int64_t>(wanted, 0xFFFFFFFE)) : 0xFFFFFFFFu;
    setsockopt(r.job.out_fd, SOL_SOCKET, kPacingRate, &rate, sizeof rate);
    r.rate = wanted;
  }
  return true;
}

bool something_to_send(const Ring& r) { return r.head_at < r.head_end || r.body_left || r.queue_at < r.queue.size(); }
// On a stalled link the next message counts as begun, as it does where the network has stalled and the socket takes its first
// bytes: that the receiver lacks it is how the diagnosis knows the link.
void hold_next(Ring& r) {
  if (r.held || r.body_left || r.queue_at == r.queue.size()) return;
  put(r.job.out_edge->messages, r.job.out_edge->messages + 1);
  r.held = true;
}

bool something_to_come(const Ring& r) { return r.out->awaited || !r.out->announced; }

// 0: nothing moves now, 1: moved, -1: error set
int send_some(Ring& r, Status& status) {
  int moved = 0;
  for (int64_t turn = 0; turn < kTurn;) {
    if (r.head_at == r.head_end && !r.body_left) {
      if (r.queue_at == r.queue.size()) return moved;
      Order order = r.queue[r.queue_at++];
      const Piece& piece = r.job.pieces[order.piece];
      Frame frame{kPiece, order.piece, order.hop, uint32_t(piece.length)};
      std::memcpy(r.head, &frame, sizeof frame);
      r.head_at = 0;
      r.head_end = sizeof frame;
      r.body = r.job.data + piece.offset;
      r.body_left = piece.length;
      if (!r.held) put(r.job.out_edge->messages, r.job.out_edge->messages + 1);
      r.held = false;
      --r.out->unsent;
    }
    iovec parts[2] = {{r.head + r.head_at, r.head_end - r.head_at}, {const_cast<uint8_t*>(r.body), size_t(r.body_left)}};
    msghdr message{};
    message.msg_iov = parts[0].iov_len ? parts : parts + 1;
    message.msg_iovlen = parts[0].iov_len && r.body_left ? 2 : 1;
    ssize_t count = sendmsg(r.job.out_fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (count < 0) {
      if (errno == EAGAIN || errno == EWOULDBLOCK) return moved;
      if (errno == EINTR) continue;
      r.out->error = errno;
      status = kLostSuccessor;
      return -1;
    }
    moved = 1;
    turn += count;
    put(r.job.out_edge->bytes, r.job.out_edge->bytes + int64_t(count));
    put(r.job.out_edge->progress_ns, now_ns());
    size_t of_head = std::min(size_t(count), r.head_end - r.head_at);
    r.head_at += of_head;
    r.body += count - of_head;
    r.body_left -= count - of_head;
  }
  return moved;
}

bool expected(const Ring& r) {
  const Frame& f = r.frame;
  if (!r.out->announced || f.piece >= uint32_t(r.job.piece_count)) return false;
  const Piece& piece = r.job.pieces[f.piece];
  return f.length == piece.length && f.hop >= 1 && f.hop <= uint32_t(piece.hops) &&
         int32_t((piece.start + f.hop) % r.job.size) == r.job.rank;
}

bool take(Ring& r, int64_t now, Status& status) {  // a whole frame has come
  if (r.frame.kind == kAnnounce) {
    if (std::memcmp(r.small, r.job.announcement, sizeof r.job.announcement) != 0) {
      std::memcpy(r.out->announcement, r.small, sizeof r.out->announcement);
      status = kMismatch;
      return false;
    }
    r.out->announced = 1;
    put(r.job.in_edge->lateness_ns, std::max<int64_t>(0, r.first_ns - r.job.begun_ns));
  } else if (r.frame.kind == kAbort) {
    std::memcpy(r.out->text, r.small, r.frame.length);
    r.out->text_bytes = int32_t(r.frame.length);
    status = kTold;
    return false;
  } else {
    const Piece& piece = r.job.pieces[r.frame.piece];
    Edge& edge = *r.job.in_edge;
    put(edge.wait_ns, edge.wait_ns + std::max<int64_t>(0, r.first_ns - r.ready_ns));
    put(edge.transfer_ns, edge.transfer_ns + std::max<int64_t>(0, now - r.first_ns - r.adding_ns));
    put(edge.messages, edge.messages + 1);
    if (int32_t(r.frame.hop) == piece.accumulate && r.job.average) divide(r, r.job.data + piece.offset, piece.length);
    if (int32_t(r.frame.hop) < piece.hops) r.queue.push_back({r.frame.piece, r.frame.hop + 1});
    --r.out->awaited;
  }
  r.in_body = false;
  r.frame_have = 0;
  r.first_ns = 0;
  r.adding_ns = 0;
  r.ready_ns = now_ns();
  return true;
}

int receive_some(Ring& r, Status& status) {
  int moved = 0;
  for (int64_t turn = 0; turn < kTurn && something_to_come(r);) {
    uint8_t* target;
    size_t room;
    bool adding = false;
    if (!r.in_body) {
      target = reinterpret_cast<uint8_t*>(&r.frame) + r.frame_have;
      room = sizeof(Frame) - r.frame_have;
    } else if (r.frame.kind != kPiece) {
      target = r.small + r.body_have;
      room = r.frame.length - r.body_have;
    } else {
      const Piece& piece = r.job.pieces[r.frame.piece];
      adding = int32_t(r.frame.hop) <= piece.accumulate;
      room = piece.length - r.body_have;
      if (adding) {
        target = r.slice.data() + r.slice_have;
        room = std::min(room, kSlice - size_t(r.slice_have));
      } else {
        target = r.job.data + piece.offset + r.body_have;
      }
    }
    ssize_t count = recv(r.job.in_fd, target, room, MSG_DONTWAIT);
    if (count < 0) {
      if (errno == EAGAIN || errno == EWOULDBLOCK) return moved;
      if (errno == EINTR) continue;
      r.out->error = errno;
      status = kLostPredecessor;
      return -1;
    }
    if (count == 0) {
      r.out->error = 0;
      status = kLostPredecessor;
      return -1;
    }
    int64_t now = now_ns();
    moved = 1;
    turn += count;
    if (!r.first_ns) r.first_ns = now;
    put(r.job.in_edge->bytes, r.job.in_edge->bytes + int64_t(count));
    put(r.job.in_edge->progress_ns, now);
    bool whole = false;
    if (!r.in_body) {
      r.frame_have += count;
      if (r.frame_have < sizeof(Frame)) continue;
      const Frame& f = r.frame;
      bool good = f.kind == kPiece ? expected(r) : f.kind == kAnnounce ? f.length == 24 : f.kind == kAbort && f.length <= kAbortBytes;
      if (!good) {
        status = kProtocol;
        return -1;
      }
      r.in_body = true;
      r.body_have = r.slice_have = 0;
      whole = f.length == 0;
    } else {
      r.body_have += count;
      whole = r.body_have == int64_t(r.frame.length);
      if (adding) {
        r.slice_have += count;
        int64_t step = width(r.job.element_type), bytes = r.slice_have / step * step;
        if (whole || r.slice_have == int64_t(kSlice)) {
          const Piece& piece = r.job.pieces[r.frame.piece];
          add(r, r.job.data + piece.offset + r.body_have - r.slice_have, r.slice.data(), bytes);
          r.slice_have -= bytes;
          if (!whole) r.adding_ns += now_ns() - now;
        }
      }
    }
    if (whole && !take(r, now, status)) return -1;
  }
  return moved;
}

// Backwards comes nothing but a reason to give up, or the end.
Status hear_successor(Ring& r) {
  Frame frame;
  uint8_t text[kAbortBytes];
  auto whole = [&](void* to, size_t bytes) {
    timeval limit{0, 200000};
    setsockopt(r.job.out_fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    for (size_t have = 0; have < bytes;) {
      pollfd wait{r.job.out_fd, POLLIN, 0};
      if (poll(&wait, 1, 200) <= 0) return false;
      ssize_t count = recv(r.job.out_fd, static_cast<uint8_t*>(to) + have, bytes - have, MSG_DONTWAIT);
      if (count <= 0) {
        r.out->error = count < 0 ? errno : 0;
        return false;
      }
      have += count;
    }
    return true;
  };
  if (!whole(&frame, sizeof frame) || frame.kind != kAbort || frame.length > kAbortBytes || !whole(text, frame.length))
    return kLostSuccessor;
  std::memcpy(r.out->text, text, frame.length);
  r.out->text_bytes = int32_t(frame.length);
  return kTold;
}

Status turn(Ring& r) {
  Status status = kDone;
  while (something_to_come(r) || something_to_send(r) || r.out->unsent) {
    bool flowing = flows(r);
    if (!flowing) hold_next(r);
    int came = something_to_come(r) ? receive_some(r, status) : 0;
    if (came < 0) return status;
    int went = flowing && something_to_send(r) ? send_some(r, status) : 0;
    if (went < 0) return status;
    if (came || went) continue;
    pollfd fds[2] = {{r.successor_left ? -1 : r.job.out_fd, short(POLLIN | (flowing && something_to_send(r) ? POLLOUT : 0)), 0},
                     {r.job.in_fd, POLLIN, 0}};
    int64_t left_ms = (r.job.deadline_ns - now_ns()) / 1000000;
    if (left_ms < 0) return kTimeout;
    int ready = poll(fds, something_to_come(r) ? 2 : 1, int(std::min<int64_t>(left_ms + 1, flowing ? 1000 : kStallPollMs)));
    if (ready < 0) {
      if (errno == EINTR) return kInterrupted;  // Python runs its signal handlers and comes back
      r.out->error = errno;
      return kProtocol;
    }
    if (fds[0].revents & (POLLIN | POLLHUP | POLLERR)) {
      Status heard = hear_successor(r);
      // Whoever needs nothing more of this operation may leave; if it was lost, who waits for it says so.
      if (heard != kLostSuccessor || something_to_send(r) || r.out->unsent) return heard;
      r.successor_left = true;
    }
  }
  return kDone;
}

}  // namespace

extern "C" {

// Begin an operation. ``out`` must live until it ends.
void c4_ring_begin(Ring* ring, const Job* job, Outcome* out) {
  Ring& r = *ring;
  r.job = *job;
  r.out = out;
  std::memset(out, 0, sizeof *out);
  out->awaited = job->receives;
  out->unsent = job->sends;
  r.queue.clear();
  r.queue_at = 0;
  for (int32_t i = 0; i < job->piece_count; ++i)
    if (job->pieces[i].start == job->rank && job->pieces[i].hops) r.queue.push_back({uint32_t(i), 1});
  Frame frame{kAnnounce, 0, 0, 24};
  std::memcpy(r.head, &frame, sizeof frame);
  std::memcpy(r.head + sizeof frame, job->announcement, 24);
  r.head_at = 0;
  r.head_end = sizeof frame + 24;
  r.body = nullptr;
  r.body_left = 0;
  r.in_body = r.held = false;
  r.frame_have = 0;
  r.body_have = r.slice_have = 0;
  r.first_ns = r.adding_ns = 0;
  r.ready_ns = job->begun_ns;
  r.slice.resize(kSlice);
}

// Go on with it until it ends, fails, or a signal came (7: call again).
int32_t c4_ring_run(Ring* ring) {
  Ring& r = *ring;
  Status status = turn(r);
  if (status != kDone && status != kInterrupted) {
    r.out->rest_head = r.head + r.head_at;
    r.out->rest_head_bytes = int64_t(r.head_end - r.head_at);
    r.out->rest_body = r.body;
    r.out->rest_body_bytes = r.body_left;
  }
  return status;
}

void c4_ring_deadline(Ring* ring, int64_t deadline_ns) { ring->job.deadline_ns = deadline_ns; }

int32_t c4_ring_has_half() {
#ifdef __FLT16_MAX__
  return 1;
#else
  return 0;
#endif
}
}
