// Block-sparse attention in float32 of float32 and 16-bit tensors: the compiled half of block_sparse.py. Shapes are those
// of reference.py.
//
// Every thread makes the same one call and takes parts of the work from shared counters: first keys and values are
// packed as the inner loop reads them, then each task attends from some rows of one query block. A task walks its keys
// in tiles that stay in the cache, with a running maximum and sum for every row. What a row gets depends on its query
// block alone, so results are the same bit for bit on any number of threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <thread>
#include <vector>

namespace {

// Registers decide the inner tile: ROWS x 2 sums, 2 vectors of keys or values and one broadcast must fit.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12;
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 6;
#elif defined(__aarch64__)
constexpr int LANES = 4, ROWS = 12;
#else
constexpr int LANES = 4, ROWS = 6;
#endif
constexpr int PANEL = 2 * LANES;         // keys, or channels of values, that lie beside each other
constexpr int MAX_HEAD_DIM = 256;
constexpr int TILE = 256;                // keys between two updates of a row's maximum
constexpr int STRIDE = 256 + 16;        // of a row of queries (channels) or scores (keys); no power of 2, so that rows share no cache set
constexpr int ROWS_PER_TASK = 240;       // a multiple of ROWS; larger query blocks are several tasks
constexpr int64_t PLACES_PER_PART = 512; // keys packed at a time; a multiple of PANEL
constexpr double LOG2_E = 1.44269504088896341, LN_2 = 0.69314718055994531; // in float32 they would shift every logit
constexpr float INFINITE = std::numeric_limits<float>::infinity();

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef int32_t Integers __attribute__((vector_size(LANES * 4)));

int64_t rounded_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// A tensor [B, H, n, ...] or [B, H, n] by its address and strides in elements; 0 where it is broadcast.
template <class T>
struct View {
    T *data;
    int64_t batch, head, row;

    T *at(int64_t b, int64_t h) const { return data ? data + b * batch + h * head : nullptr; }
};

enum Kind : int64_t { FLOAT32, FLOAT16, BFLOAT16 };

// The same fields as `_Call` in compiled.py.
struct Call {
    int64_t kind; // of q, k, v and the means
    int64_t batch, heads, head_dim, query_blocks, max_query_block, max_keys, means;
    double scale;
    View<const char> q, k, v;
    View<float> out, lse;
    View<const int32_t> query_bounds, key_bounds, indptr, columns;
    View<const int64_t> query_order, key_order; // null: the tokens' own order
    View<const uint8_t> chosen;                 // [nq]; null: all query blocks
    View<const char> mean_keys, mean_values;
    View<const float> log_counts;
    View<const uint8_t> pairs;
    View<float> packed_keys, packed_values;
    std::atomic<int64_t> next_part, packed_parts, next_task;
};

float bits_as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// A number of float16: its exponent is 112 less than float32's; infinities and NaN keep all exponent bits.
float from_float16(uint16_t x) {
    uint32_t magnitude = (x & 0x7fffu) << 13;
    uint32_t special = (x & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    float widened = bits_as_float(magnitude) * bits_as_float((127u + 112u) << 23);
    uint32_t bits;
    std::memcpy(&bits, &widened, sizeof bits);
    return bits_as_float(bits | special | (x & 0x8000u) << 16);
}

float from_bfloat16(uint16_t x) { return bits_as_float((uint32_t)x << 16); }

// Row `n` of a head in float32: in place, or converted to `room`.
const float *row_of(const Call &call, const View<const char> &x, int64_t b, int64_t h, int64_t n, float *room) {
    int64_t offset = b * x.batch + h * x.head + n * x.row;
    if (call.kind == FLOAT32) return (const float *)x.data + offset;
    const uint16_t *from = (const uint16_t *)x.data + offset;
    if (call.kind == FLOAT16)
        for (int64_t d = 0; d < call.head_dim; d++) room[d] = from_float16(from[d]);
    else
        for (int64_t d = 0; d < call.head_dim; d++) room[d] = from_bfloat16(from[d]);
    return room;
}

// Keys and values as the inner loop reads them.
struct Keys {
    float *keys;     // [panel][channel][PANEL keys]
    float *values;   // [panel of channels][key][PANEL channels]
    int64_t capacity;
    const float *bias; // [key], added to logits (base 2); null: none

    void put(int64_t place, const float *key, const float *value, int64_t head_dim) const {
        float *column = keys + place / PANEL * PANEL * head_dim + place % PANEL;
        for (int64_t d = 0; d < head_dim; d++) column[d * PANEL] = key[d];
        for (int64_t first = 0; first < head_dim; first += PANEL) {
            float *row = values + first * capacity + place * PANEL;
            int64_t width = std::min<int64_t>(PANEL, head_dim - first);
            std::memcpy(row, value + first, width * sizeof(float));
            for (int64_t d = width; d < PANEL; d++) row[d] = 0;
        }
    }
};

Keys packed_head(const Call &call, int64_t b, int64_t h) {
    return {call.packed_keys.at(b, h), call.packed_values.at(b, h), call.packed_keys.row, nullptr};
}

// Some neighbouring keys, and the column of a tile of scores where their first vector begins.
struct Piece {
    const Keys *from;
    int64_t first, last; // places
    int64_t column;

    int64_t vectors_begin() const { return first / LANES * LANES; }
};

// What a thread works in.
struct Scratch {
    alignas(64) float queries[ROWS_PER_TASK * STRIDE]; // scaled so that logits have base 2
    alignas(64) float sums[ROWS_PER_TASK * MAX_HEAD_DIM];      // [row][channel], of weights times values
    alignas(64) float scores[ROWS * STRIDE];
    alignas(64) Vector totals[ROWS_PER_TASK];          // of weights, lane by lane
    float largest[ROWS_PER_TASK];
    std::vector<Piece> pieces;
    std::vector<float> mean_keys, mean_values, mean_bias;
};

Vector load(const float *from) {
    Vector x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

void store(float *to, Vector x) { std::memcpy(to, &x, sizeof x); }

Vector larger(Vector a, Vector b) { return a > b ? a : b; }

float largest_lane(Vector x) {
    float lanes[LANES];
    store(lanes, x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
}

float sum_of_lanes(Vector x) {
    float lanes[LANES];
    store(lanes, x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

// 2^x for x <= 0 within 2e-7 of itself; 0 below 2^-125. A polynomial on [-1/2, 1/2], then the exponent is raised.
Vector power_of_2(Vector x) {
    const float MAGIC = 12582912.0f; // 1.5 * 2^23: adding it leaves the nearest whole number in the lowest bits
    Vector shifted = x + MAGIC;
    Vector f = x - (shifted - MAGIC);
    Vector y = Vector{} + 0.0001534581242594868f;
    y = y * f + 0.0013399930903688073f;
    y = y * f + 0.009618489071726799f;
    y = y * f + 0.05550328642129898f;
    y = y * f + 0.24022646248340607f;
    y = y * f + 0.6931471824645996f;
    y = y * f + 1.0f;
    Vector raised = (Vector)((Integers)y + ((Integers)shifted << 23));
    return x < -125.0f ? Vector{} : raised;
}

// sums[r][v] += a[r, :depth] . b[:depth, v]: the inner loop of both products. Rows of `a` are STRIDE apart.
template <int R, int V>
inline __attribute__((always_inline)) void multiply(const float *a, const float *b, int64_t depth, Vector (&sums)[R][V]) {
    for (int64_t k = 0; k < depth; k++, b += PANEL) {
        Vector right[V];
        for (int v = 0; v < V; v++) right[v] = load(b + v * LANES);
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) sums[r][v] += right[v] * a[r * STRIDE + k];
    }
}

// Logits of R queries over V vectors of keys from `place` on; those outside the piece are minus infinity.
template <int R, int V>
void score(const float *queries, const Piece &piece, int64_t place, int64_t head_dim, float *scores) {
    Vector sums[R][V] = {};
    multiply<R, V>(queries, piece.from->keys + place / PANEL * PANEL * head_dim + place % PANEL, head_dim, sums);
    for (int v = 0; v < V; v++, place += LANES) {
        Vector bias = piece.from->bias ? load(piece.from->bias + place) : Vector{};
        bool whole = place >= piece.first && place + LANES <= piece.last;
        Integers seen;
        for (int i = 0; i < LANES; i++) seen[i] = place + i >= piece.first && place + i < piece.last ? -1 : 0;
        for (int r = 0; r < R; r++) {
            Vector x = sums[r][v] + bias;
            store(scores + r * STRIDE + v * LANES, whole ? x : seen ? x : Vector{} - INFINITE);
        }
    }
}

// Scores become weights 2^(score - largest so far); `shrunk` is what earlier sums of each row shrink by. Rows go through
// each of the three steps together: none waits for the end of another's chain of additions.
template <int R>
void weigh(float *scores, int64_t columns, float *largest, Vector *totals, float *shrunk) {
    float base[R];
    for (int r = 0; r < R; r++) {
        Vector most = Vector{} + largest[r];
        for (int64_t i = 0; i < columns; i += LANES) most = larger(load(scores + r * STRIDE + i), most);
        base[r] = largest_lane(most);
    }
    for (int r = 0; r < R; r++) {
        float before = largest[r];
        largest[r] = base[r];
        if (base[r] == -INFINITE) base[r] = 0; // all logits may be minus infinity
        Vector factor = power_of_2(Vector{} + (before - base[r]));
        totals[r] *= factor;
        shrunk[r] = factor[0];
    }
    for (int r = 0; r < R; r++) {
        Vector total = totals[r], lowered = Vector{} + base[r];
        for (int64_t i = 0; i < columns; i += LANES) {
            Vector weight = power_of_2(load(scores + r * STRIDE + i) - lowered);
            total += weight;
            store(scores + r * STRIDE + i, weight);
        }
        totals[r] = total;
    }
}

// sums[:, channels] = sums * shrunk + weights . values, for V vectors of channels from `channel` on.
template <int R, int V>
void average(const float *weights, const Piece *begin, const Piece *end, int64_t channel, const float *shrunk, float *sums) {
    Vector found[R][V] = {}; // not the sums so far: adding small numbers to small ones loses less
    for (const Piece *piece = begin; piece < end; piece++) {
        const float *values = piece->from->values + channel * piece->from->capacity + piece->first * PANEL;
        const float *from = weights + piece->column + piece->first - piece->vectors_begin();
        multiply<R, V>(from, values, piece->last - piece->first, found);
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) {
            float *sum = sums + r * MAX_HEAD_DIM + channel + v * LANES;
            store(sum, load(sum) * shrunk[r] + found[r][v]);
        }
}

// R rows from `row` on see one more tile of keys.
template <int R>
void see(Scratch &s, int64_t row, const Piece *begin, const Piece *end, int64_t head_dim) {
    const float *queries = s.queries + row * STRIDE;
    int64_t columns = 0;
    for (const Piece *piece = begin; piece < end; piece++) {
        columns = piece->column;
        for (int64_t place = piece->vectors_begin(); place < piece->last;) {
            bool two = place % PANEL == 0 && place + LANES < piece->last;
            two ? score<R, 2>(queries, *piece, place, head_dim, s.scores + columns)
                : score<R, 1>(queries, *piece, place, head_dim, s.scores + columns);
            columns += two ? PANEL : LANES;
            place += two ? PANEL : LANES;
        }
    }
    float shrunk[R];
    weigh<R>(s.scores, columns, s.largest + row, s.totals + row, shrunk);
    for (int64_t channel = 0; channel < head_dim; channel += PANEL)
        channel + LANES < head_dim ? average<R, 2>(s.scores, begin, end, channel, shrunk, s.sums + row * MAX_HEAD_DIM)
                                   : average<R, 1>(s.scores, begin, end, channel, shrunk, s.sums + row * MAX_HEAD_DIM);
}

// All rows see the tile; the last few are made up to a third or two of ROWS.
void see_all(Scratch &s, int64_t rows, const Piece *begin, const Piece *end, int64_t head_dim) {
    int64_t row = 0;
    for (; rows - row > ROWS * 2 / 3; row += ROWS) see<ROWS>(s, row, begin, end, head_dim);
    if (rows - row > ROWS / 3)
        see<ROWS * 2 / 3>(s, row, begin, end, head_dim);
    else if (rows > row)
        see<ROWS / 3>(s, row, begin, end, head_dim);
}

// Append the places from `first` to `last`, cut where a tile is full; `column` is the next one free.
void add(std::vector<Piece> &pieces, int64_t &column, const Keys &from, int64_t first, int64_t last) {
    while (first < last) {
        if (column == TILE) column = 0;
        Piece piece{&from, first, last, column};
        piece.last = std::min(last, piece.vectors_begin() + TILE - column);
        column += rounded_up(piece.last - piece.vectors_begin(), LANES);
        first = piece.last;
        pieces.push_back(piece);
    }
}

// The means that a query block sees, packed.
Keys gathered_means(const Call &call, Scratch &s, int64_t b, int64_t h, int64_t block, int64_t &count) {
    const uint8_t *pairs = call.pairs.at(b, h) + block * call.pairs.row;
    const float *log_counts = call.log_counts.at(b, h);
    int64_t capacity = rounded_up(call.means, PANEL), channels = rounded_up(call.head_dim, PANEL);
    s.mean_keys.resize(capacity * call.head_dim);
    s.mean_values.resize(capacity * channels);
    s.mean_bias.resize(capacity);
    Keys means{s.mean_keys.data(), s.mean_values.data(), capacity, s.mean_bias.data()};
    float key[MAX_HEAD_DIM], value[MAX_HEAD_DIM];
    count = 0;
    for (int64_t i = 0; i < call.means; i++) {
        if (!pairs[i] || !std::isfinite(log_counts[i])) continue;
        means.put(count, row_of(call, call.mean_keys, b, h, i, key), row_of(call, call.mean_values, b, h, i, value),
                  call.head_dim);
        s.mean_bias[count++] = (float)(log_counts[i] * LOG2_E);
    }
    return means;
}

// Everything that a query block sees, neighbouring blocks joined.
void list_keys(const Call &call, Scratch &s, int64_t b, int64_t h, int64_t block, const Keys &head, Keys &means) {
    const int32_t *indptr = call.indptr.at(b, h), *bounds = call.key_bounds.at(b, h);
    int64_t column = 0, first = 0, last = 0;
    s.pieces.clear();
    for (int64_t i = indptr[block]; i < indptr[block + 1]; i++) {
        int64_t start = bounds[call.columns.data[i]], stop = bounds[call.columns.data[i] + 1];
        if (start != last) {
            add(s.pieces, column, head, first, last);
            first = start;
        }
        last = stop;
    }
    add(s.pieces, column, head, first, last);
    if (call.means) {
        int64_t count;
        means = gathered_means(call, s, b, h, block, count);
        add(s.pieces, column, means, 0, count);
    }
}

// Rows `first` to `last` (places) of one query block.
void attend(const Call &call, Scratch &s, int64_t b, int64_t h, int64_t block, int64_t first, int64_t last) {
    const int64_t *order = call.query_order.at(b, h);
    int64_t head_dim = call.head_dim, rows = last - first, padded = rounded_up(rows, ROWS);
    Keys head = packed_head(call, b, h), means{};
    s.pieces.clear();
    if (!call.chosen.data || call.chosen.data[block]) list_keys(call, s, b, h, block, head, means);
    double factor = call.scale * LOG2_E;
    for (int64_t row = 0; row < padded; row++) {
        float *query = s.queries + row * STRIDE;
        if (row < rows) {
            const float *from = row_of(call, call.q, b, h, order ? order[first + row] : first + row, query);
            for (int64_t d = 0; d < head_dim; d++) query[d] = (float)(from[d] * factor);
        } else {
            std::memset(query, 0, head_dim * sizeof(float));
        }
        std::memset(s.sums + row * MAX_HEAD_DIM, 0, rounded_up(head_dim, PANEL) * sizeof(float));
        s.largest[row] = -INFINITE;
        s.totals[row] = Vector{};
    }
    const Piece *end = s.pieces.data() + s.pieces.size();
    for (const Piece *tile = s.pieces.data(), *next; tile < end; tile = next) {
        for (next = tile + 1; next < end && next->column;) next++;
        see_all(s, rows, tile, next, head_dim);
    }
    for (int64_t row = 0; row < rows; row++) {
        int64_t token = order ? order[first + row] : first + row;
        float total = sum_of_lanes(s.totals[row]), share = total == 0 ? 0 : 1 / total;
        float *out = call.out.at(b, h) + token * call.out.row;
        for (int64_t d = 0; d < head_dim; d++) out[d] = s.sums[row * MAX_HEAD_DIM + d] * share;
        float base = s.largest[row] == -INFINITE ? 0 : s.largest[row];
        call.lse.at(b, h)[token] = total == 0 ? -INFINITE : (float)((base + std::log2(total)) * LN_2);
    }
}

void pack(const Call &call, int64_t b, int64_t h, int64_t first) {
    const int64_t *order = call.key_order.at(b, h);
    Keys head = packed_head(call, b, h);
    int64_t last = std::min<int64_t>(first + PLACES_PER_PART, call.max_keys);
    float key[MAX_HEAD_DIM], value[MAX_HEAD_DIM];
    for (int64_t place = first; place < last; place++) {
        int64_t token = order ? order[place] : place;
        head.put(place, row_of(call, call.k, b, h, token, key), row_of(call, call.v, b, h, token, value), call.head_dim);
    }
}

void work(Call &call) {
    int64_t parts = (call.max_keys + PLACES_PER_PART - 1) / PLACES_PER_PART, heads = call.batch * call.heads;
    for (int64_t i; (i = call.next_part++) < heads * parts; call.packed_parts++)
        pack(call, i / parts / call.heads, i / parts % call.heads, i % parts * PLACES_PER_PART);
    // whoever took a part is at work on it, so this wait ends even if the other threads never start
    while (call.packed_parts < heads * parts) std::this_thread::yield();
    parts = (call.max_query_block + ROWS_PER_TASK - 1) / ROWS_PER_TASK;
    int64_t tasks = heads * call.query_blocks * parts;
    if (call.next_task >= tasks) return;
    std::vector<Scratch> scratch(1);
    for (int64_t i; (i = call.next_task++) < tasks;) {
        int64_t block = i / parts % call.query_blocks, head = i / parts / call.query_blocks;
        const int32_t *bounds = call.query_bounds.at(head / call.heads, head % call.heads);
        int64_t first = bounds[block] + i % parts * ROWS_PER_TASK;
        int64_t last = std::min<int64_t>(bounds[block + 1], first + ROWS_PER_TASK);
        if (first < last) attend(call, scratch[0], head / call.heads, head % call.heads, block, first, last);
    }
}

} // namespace

// Called by every thread with the same call; returns 1 if memory is short, then some rows were not written.
extern "C" int pointillist_attention(Call *call) {
    try {
        work(*call);
        return 0;
    } catch (const std::bad_alloc &) {
        return 1;
    }
}
