package watchring

import "math/rand/v2"

// rangeTree finds the targets whose key range holds a key: a treap ordered by (key, end), in which every
// node knows the greatest end below it. Finding takes O(log n) and a little per hit for ranges that nest
// or lie side by side, as prefixes do; it never looks at a subtree whose ranges all end before the
// key or begin after it.
//
// An end of "" means that the range has none. The zero value is ready for use.
type rangeTree struct {
	root *rangeNode
	n    int
}

type rangeNode struct {
	target      *target
	maxEnd      string // the greatest end in this subtree, "" for none
	priority    uint64 // a node's is not below its children's
	left, right *rangeNode
}

// endAfter reports whether a range that ends at end goes on at key.
func endAfter(end string, key []byte) bool { return end == "" || string(key) < end }

// endLess orders ends; "" is the greatest.
func endLess(a, b string) bool { return a != "" && (b == "" || a < b) }

// before orders ranges.
func rangeBefore(key, end string, t *target) bool {
	if key != t.key {
		return key < t.key
	}
	return endLess(end, t.end)
}

func (n *rangeNode) update() {
	n.maxEnd = n.target.end
	if n.left != nil && endLess(n.maxEnd, n.left.maxEnd) {
		n.maxEnd = n.left.maxEnd
	}
	if n.right != nil && endLess(n.maxEnd, n.right.maxEnd) {
		n.maxEnd = n.right.maxEnd
	}
}

// get returns the target of exactly this range, or nil.
func (t *rangeTree) get(key, end string) *target {
	for n := t.root; n != nil; {
		switch {
		case key == n.target.key && end == n.target.end:
			return n.target
		case rangeBefore(key, end, n.target):
			n = n.left
		default:
			n = n.right
		}
	}
	return nil
}

// insert adds a target whose range is not in the tree yet.
func (t *rangeTree) insert(x *target) {
	t.n++
	t.root = t.root.insert(&rangeNode{target: x, maxEnd: x.end, priority: rand.Uint64()})
}

func (n *rangeNode) insert(x *rangeNode) *rangeNode {
	if n == nil {
		return x
	}
	if x.priority > n.priority {
		x.left, x.right = n.split(x.target.key, x.target.end)
		x.update()
		return x
	}
	if rangeBefore(x.target.key, x.target.end, n.target) {
		n.left = n.left.insert(x)
	} else {
		n.right = n.right.insert(x)
	}
	n.update()
	return n
}

// split divides the subtree into what is before the range and what is not.
func (n *rangeNode) split(key, end string) (before, after *rangeNode) {
	if n == nil {
		return nil, nil
	}
	if rangeBefore(key, end, n.target) {
		before, n.left = n.left.split(key, end)
		n.update()
		return before, n
	}
	n.right, after = n.right.split(key, end)
	n.update()
	return n, after
}

// remove takes out the target, which must be in the tree.
func (t *rangeTree) remove(x *target) {
	t.n--
	t.root = t.root.remove(x)
}

func (n *rangeNode) remove(x *target) *rangeNode {
	switch {
	case n == nil:
		return nil
	case n.target == x:
		return merge(n.left, n.right)
	case rangeBefore(x.key, x.end, n.target):
		n.left = n.left.remove(x)
	default:
		n.right = n.right.remove(x)
	}
	n.update()
	return n
}

// merge joins two subtrees, all of a before all of b.
func merge(a, b *rangeNode) *rangeNode {
	switch {
	case a == nil:
		return b
	case b == nil:
		return a
	case a.priority > b.priority:
		a.right = merge(a.right, b)
		a.update()
		return a
	default:
		b.left = merge(a, b.left)
		b.update()
		return b
	}
}

// find appends the targets whose range holds key to dst, and returns it.
func (t *rangeTree) find(dst []*target, key []byte) []*target { return t.root.find(dst, key) }

func (n *rangeNode) find(dst []*target, key []byte) []*target {
	for n != nil && endAfter(n.maxEnd, key) {
		dst = n.left.find(dst, key)
		if string(key) < n.target.key {
			return dst
		}
		if endAfter(n.target.end, key) {
			dst = append(dst, n.target)
		}
		n = n.right
	}
	return dst
}

// each calls f for every target.
func (t *rangeTree) each(f func(*target)) { t.root.each(f) }

func (n *rangeNode) each(f func(*target)) {
	if n != nil {
		n.left.each(f)
		f(n.target)
		n.right.each(f)
	}
}
