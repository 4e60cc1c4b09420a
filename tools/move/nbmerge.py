#!/usr/bin/env python3
"""git merge driver for notebooks: three-way by cell id. usage: nbmerge.py BASE OURS THEIRS (writes OURS)."""
import json, sys
B,O,T=[json.load(open(p)) if open(p).read().strip() else None for p in sys.argv[1:4]]
if B is None: sys.exit(1)
src=lambda c:(c['cell_type'],''.join(c['source']))
def idx(n): return {c['id']:c for c in n['cells']}
b,o,t=idx(B),idx(O),idx(T)
conf=[]
out={}
for i in set(o)|set(t):
    if i in o and i in t:
        if i in b:
            if src(o[i])==src(b[i]): out[i]=t[i] if src(t[i])!=src(b[i]) or o[i]==b[i] else o[i]
            elif src(t[i])==src(b[i]) or src(t[i])==src(o[i]): out[i]=o[i]
            else: 
                # textual 3-way on source
                import subprocess,tempfile,os
                d=tempfile.mkdtemp(); ps=[]
                for n,c in (('o',o[i]),('b',b[i]),('t',t[i])):
                    p=os.path.join(d,n); open(p,'w').write(''.join(c['source'])+'\n'); ps.append(p)
                r=subprocess.run(['git','merge-file','-p','-q',*ps],capture_output=True,text=True)
                c=dict(o[i]); s=r.stdout.rstrip('\n'); c['source']=s.splitlines(True)
                if r.returncode: conf.append(i)
                out[i]=c
        else: out[i]=o[i]
    elif i in o:
        if i in b:
            if src(o[i])!=src(b[i]): conf.append(i+' deleted theirs'); out[i]=o[i]
        else: out[i]=o[i]
    else:
        if i in b:
            if src(t[i])!=src(b[i]): conf.append(i+' deleted ours'); out[i]=t[i]
        else: out[i]=t[i]
# order: ours, with theirs' new cells after their predecessor
order=[c['id'] for c in O['cells'] if c['id'] in out]
tid=[c['id'] for c in T['cells']]
for n,i in enumerate(tid):
    if i in out and i not in order:
        prev=next((p for p in reversed(tid[:n]) if p in order),None)
        order.insert(order.index(prev)+1 if prev else 0,i)
O['cells']=[out[i] for i in order]
open(sys.argv[2],'w').write(json.dumps(O,indent=1,ensure_ascii=False,sort_keys=True)+'\n')
if conf: print('NB CONFLICT',sys.argv[4:] ,conf,file=sys.stderr); sys.exit(1)
